"""sparse_ternary_matmul on AVX2: walk.py's loops around columns_avx2.py's walk and tiles.

    tile       | value | bound by
    ahead      | 2     | groups of columns that cover the latency of memory: knob
    most       | 3/4   | reading on beats following the list, whose runs end after a column
    batch      | 1/2   | a tiled row costs half as much a column as a walked one: knob
    stripe     | 2     | blocks, a cache line of each column, near for the next row
    wide       | 4     | as ternary_matmul

Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, 2560 x 6912, cold, two threads, medians
of interleaved calls, us at 50, 84, 92 % zeros: 249, 91, 52 (split by outputs, without prefetching,
384, 182, 95; ahead 0 between them). 64 rows, one thread, busy: 28 % active 14.7 ms, all 23.5.
"""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import avx2
from schedules.sparse_ternary_matmul import columns_avx2, walk
from schedules.sparse_ternary_matmul.columns_avx2 import BLOCK, COLUMNS, TILED_ROWS, tile_rows
from schedules.sparse_ternary_matmul.walk import Tiles, Walk
from schedules.targets import CpuTarget
from schedules.ternary_matmul.quads_avx2 import MULTIPLY_ADD, Products

KNOBS = {
    "ahead": (2, 1, 4, 0),
    "most_eighths": (6, 4, 8),  # of K: from here on a row walks every column
    "batch_sixteenths": (8, 4, 1, 16),  # of M K: from here on rows are tiled
    "stripe": (2, 1, 4),  # blocks
    "wide": (4, 2, 1),  # rows that share unpacked codes
}


def layout() -> str:
    return "columns_2bit"


def value(sums, row, j, lanes: int):
    return avx2.load(sums, row, j, lanes=lanes)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    *,
    ahead: int = 2,
    most_eighths: int = 6,
    batch_sixteenths: int = 8,
    stripe: int = 2,
    wide: int = 4,
    products: Products = MULTIPLY_ADD,
) -> PrimFunc:
    columns = Walk(BLOCK, COLUMNS, partial(columns_avx2.walk, ahead=ahead), value, ahead)
    tiles = Tiles(
        lambda rows, active: T.And(rows >= TILED_ROWS, active * 16 >= rows * k * batch_sixteenths),
        partial(tile_rows, k=k, products=products, wide=wide),
        lambda rows, share: T.if_then_else(rows < TILED_ROWS, share, stripe),
    )
    return walk.kernel(n, k, columns, tiles, most_eighths)
