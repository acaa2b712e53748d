"""sparse_ternary_matmul on AVX2: walk.py's loops around ternary_matmul's walk, pairs of columns.

    tile       | value | bound by
    ahead      | 2     | groups of columns that cover the latency of memory: knob
    most       | 3/4   | reading on beats following the list, whose runs end after a column
    batch      | 1/4   | a tiled row costs some 3 times less a column than a walked one
    stripe     | 2     | blocks, a cache line of each column, near for the next row
    wide       | 4     | as ternary_matmul
    l2_eighths | 4     | as ternary_matmul

Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, 2560 x 6912, cold, two threads, medians
of interleaved calls, us at 50, 84, 92 % zeros: 249, 91, 52 (split by outputs, without prefetching,
384, 182, 95; ahead 0 between them).
"""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import avx2
from schedules.sparse_ternary_matmul import walk
from schedules.sparse_ternary_matmul.walk import Tiles, Walk
from schedules.targets import CpuTarget
from schedules.ternary_matmul import columns_avx2
from schedules.ternary_matmul.columns_avx2 import BLOCK, COLUMNS, WIDE, tile_rows

KNOBS = {
    "ahead": (2, 1, 4, 0),
    "most_eighths": (6, 4, 8),  # of K: from here on a row walks every column
    "batch_sixteenths": (4, 1, 8, 16),  # of M K: from here on rows are tiled
    "stripe": (2, 1, 4),  # blocks
    "wide": (4, 2, 1),  # rows that share unpacked codes
    "l2_eighths": (4, 2, 8, 32),  # of the target's L2, for a tile of rows
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
    batch_sixteenths: int = 4,
    stripe: int = 2,
    wide: int = 4,
    l2_eighths: int = 4,
) -> PrimFunc:
    near_bytes = target.l2_bytes * l2_eighths // 8
    columns = Walk(BLOCK, COLUMNS, partial(columns_avx2.walk, ahead=ahead), value, ahead)
    tiles = Tiles(
        lambda rows, active: T.And(rows >= WIDE, active * 16 >= rows * k * batch_sixteenths),
        partial(tile_rows, k=k, wide=wide, near_bytes=near_bytes),
        lambda rows, share: T.if_then_else(rows < WIDE, share, stripe),
    )
    return walk.kernel(n, k, columns, tiles, most_eighths)
