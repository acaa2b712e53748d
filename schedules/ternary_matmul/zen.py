"""ternary_matmul on Zen 1 to 3: avx2.py, weights asked for into L2, four times each.

Why four times: intrin/zen.py.

Measured: EPYC of family 25, model 17, which is a Zen 4, 2 cores, 2026-11-23, cold, medians of 15
paired ratios to avx2.py's time, one thread and two, into L2 once, four times 2048 bytes ahead, and
4096: 6912 x 2560 INT4 0.92, 0.86, 0.82 and 0.94, 0.88, 0.88; by gate, 67 % needless, 0.85, 0.64,
0.63 and 0.93, 0.77, 0.80; 3840 x 2560 INT8 0.97, 0.94, 0.92 and 0.84, 0.84, 0.77.
"""

from functools import partial

from schedules.intrin import zen
from schedules.ternary_matmul import avx2

KNOBS = avx2.KNOBS | {"prefetch": (4096, 2048, 0)}
layout = avx2.layout
kernel = zen.prefetching(partial(avx2.kernel, prefetch=4096))
