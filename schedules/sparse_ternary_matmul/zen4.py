"""sparse_ternary_matmul on Zen 4: avx512vnni.py, columns asked for into L2, four times each.

Why four times: intrin/zen.py.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, cold, us with one thread and with two:
2560 x 6912 at 84 % zeros into L1 125, 83, into L2 once, 2 groups ahead, 85, 62; in another hour 59,
48, four times, 4 groups ahead, 39, 38. 2560 x 2560 at half: 133, 74 and 70, 50; 67, 48 and 50, 39.
Up to 8 groups ahead changes nothing, 6 or 8 times in as many groups takes 1.02 to 1.31 of the time.
"""

from functools import partial

from schedules.intrin import zen
from schedules.sparse_ternary_matmul import avx512vnni

KNOBS = avx512vnni.KNOBS | {"ahead": (4, 8, 2, 0)}
layout = avx512vnni.layout
kernel = zen.prefetching(partial(avx512vnni.kernel, ahead=4))
