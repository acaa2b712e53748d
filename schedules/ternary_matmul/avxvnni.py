"""ternary_matmul on AVX-VNNI: avx2.py, with `vpdpbusd` of 32 bytes where codes are multiplied."""

from functools import partial

from schedules.ternary_matmul import avx2
from schedules.ternary_matmul.quads_avx2 import DOT

KNOBS = avx2.KNOBS
layout = avx2.layout
kernel = partial(avx2.kernel, products=DOT)
