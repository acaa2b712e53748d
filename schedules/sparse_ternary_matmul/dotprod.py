"""sparse_ternary_matmul with `sdot`: columns_neon.py."""

from functools import partial

from schedules.sparse_ternary_matmul import columns_neon
from schedules.ternary_matmul import tiles_neon

KNOBS, layout = columns_neon.KNOBS, columns_neon.layout
kernel = partial(columns_neon.kernel, form=tiles_neon.DOT)
