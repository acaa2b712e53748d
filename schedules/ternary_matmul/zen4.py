"""ternary_matmul on Zen 4: avx512vbmi.py, weights asked for into L2.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, 6912 x 2560, cold, us with one thread
and with two, prefetches into L1, none, and into L2: INT4 266, 212, 190 and 188, 155, 142; rows by
gate, 67 % of them needless, 178, 286 (another run), 120 and 114, 269, 106.
"""

from schedules.intrin import avx2
from schedules.ternary_matmul import avx512vbmi

KNOBS = avx512vbmi.KNOBS
layout = avx512vbmi.layout
kernel = avx2.prefetches_into_l2()(avx512vbmi.kernel)
