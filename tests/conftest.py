"""Settings of every test process.

Two pytest workers share two cores. An OpenMP team whose threads wait for each other by spinning
then takes 30 s for what one thread does in one (torch's eager reference), so each has one thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A developer's own tuning records would change what is built.
os.environ["XDG_DATA_HOME"] = "/nonexistent"


def pytest_addoption(parser):
    parser.addoption(
        "--every-case",
        action="store_true",
        help="run all cases of the kernels of every machine, not a share of the slow ones",
    )
