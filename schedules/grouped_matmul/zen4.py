"""grouped_matmul on Zen 4: avx512vnni.py in four streams, asked for into L2, four times each line.

Why four times: intrin/zen.py.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, 128256 x 2560 at 6 bits, cold, GB/s with
one thread and with two: into L1 18.2, 26.0; not at all 21.1, 29.0, and in four streams 26.7, 31.4,
two 29.9, 31.3, one 29.1, 32.3. Another hour, time over that of two streams not asked for, 6 bits
in two runs, 4 bits in two: 0.98, 0.91, 1.00, 0.98 and 0.96, 0.92, 0.94, 1.02; three streams 0.98,
0.92, 0.97, 0.96; two 1.01, 1.00, 1.12, 1.01.
"""

from functools import partial

from schedules.grouped_matmul import avx512vnni
from schedules.intrin import zen

KNOBS = {"streams": (4, 2, 1, 8), "prefetch": (4096, 0, 2048)}
kernel = zen.prefetching(partial(avx512vnni.kernel, streams=4, prefetch=4096))
