"""grouped_matmul on Zen 1 to 3: avx2.py in two streams, asked for into L2, four times each line.

Why four times: intrin/zen.py.

Measured: EPYC of family 25, model 17, which is a Zen 4, 2 cores, 2026-11-23, 128256 x 2560 at 6
bits, cold, medians of nine paired ratios to avx2.py's time, one thread and two: two streams 0.86,
0.87; four 0.93, 0.92; two not asked for 0.90, 0.90.
"""

from functools import partial

from schedules.grouped_matmul import avx2
from schedules.intrin import zen

KNOBS = {"streams": (2, 4, 8), "prefetch": (4096, 2048, 0)}
kernel = zen.prefetching(partial(avx2.kernel, streams=2, prefetch=4096))
