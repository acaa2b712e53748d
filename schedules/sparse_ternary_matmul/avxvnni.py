"""sparse_ternary_matmul on AVX-VNNI: avx2.py, with `vpdpbusd` of 32 bytes where rows are tiled,
which pays from fewer active columns on."""

from functools import partial

from schedules.sparse_ternary_matmul import avx2
from schedules.ternary_matmul.quads_avx2 import DOT

KNOBS = {**avx2.KNOBS, "batch_sixteenths": (5, 8, 1, 16)}
layout = avx2.layout
kernel = partial(avx2.kernel, products=DOT, batch_sixteenths=5)
