"""Which cases of a kernel's tables run: all on this host's best row, a share on the others.

Every op keeps cases on every family; which ones is fixed by their names. `--every-case` runs all,
as `make test-all` does: on two cores that takes half an hour, most of it emulated ARM.
"""

import zlib

from schedules.targets import TARGETS, CpuTarget, find
from tests.schedules.compiled import is_emulated

EMULATED_SHARE, OTHER_SHARE = 5, 3  # one case in so many


def pytest_collection_modifyitems(config, items):
    if config.getoption("--every-case"):
        return
    kept, left = [], []
    for item in items:
        in_share = zlib.crc32(item.name.encode()) % share_of(item) == 0
        (kept if in_share else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def share_of(item) -> int:
    params = getattr(item, "callspec", None)
    target = params.params.get("target", params.params.get("target_name")) if params else None
    row = TARGETS.get(target) if isinstance(target, str) else target
    if not isinstance(row, CpuTarget) or row.name == find("native").name:
        return 1
    if is_emulated(row):
        return EMULATED_SHARE
    return 1 if item.path.name == "test_knobs.py" else OTHER_SHARE  # one case a family as it is
