"""sparse_ternary_matmul on Zen 1 to 3: avx2.py, columns asked for into L2, twice each.

Why twice: intrin/zen.py; a knob of more groups ahead asks as often, up to four times.

Measured: EPYC of family 25, model 17, which is a Zen 4, 2 cores, 2026-11-23, cold, medians of 15
paired ratios to avx2.py's time, one thread and two, into L2 once, 2 groups ahead and 1, and from 4
groups on four times: 2560 x 6912 at 84 % zeros 0.76, 0.63, 0.64 and 0.85, 0.69, 0.77; 2560 x 2560
at half 0.69, 0.56, 0.60 and 0.86, 0.72, 0.79.
"""

from schedules.intrin import zen
from schedules.sparse_ternary_matmul import avx2

KNOBS = avx2.KNOBS
layout = avx2.layout
kernel = zen.prefetching(avx2.kernel)
