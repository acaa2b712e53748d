"""sparse_ternary_matmul on Zen 4: avx512vnni.py, columns asked for into L2.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, cold, us with one thread and with two,
prefetches into L1 and into L2: 2560 x 6912 at 84 % zeros 125, 85 and 83, 62; 2560 x 2560 at half
133, 70 and 74, 50.
"""

from schedules.intrin import avx2
from schedules.sparse_ternary_matmul import avx512vnni

KNOBS = avx512vnni.KNOBS
layout = avx512vnni.layout
kernel = avx2.prefetches_into_l2()(avx512vnni.kernel)
