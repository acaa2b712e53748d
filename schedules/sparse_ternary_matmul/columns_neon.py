"""sparse_ternary_matmul on NEON: walk.py's loops around ternary_matmul's walk.

    tile             | value | bound by
    most_eighths     | 6     | reading on beats following the list, whose runs end after a column
    batch_sixteenths | 4     | a tiled row costs some 3 times less a column than a walked one
    stripe           | 2     | blocks, a cache line of each column, near for the next row

Counted: docs/log.md.
"""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import lanes as vector
from schedules.sparse_ternary_matmul import walk
from schedules.sparse_ternary_matmul.walk import Tiles, Walk
from schedules.targets import CpuTarget
from schedules.ternary_matmul import columns_neon, tiles_neon
from schedules.ternary_matmul.columns_neon import BLOCK, FIELDS, GROUP
from schedules.ternary_matmul.tiles_neon import Form

KNOBS = {
    "most_eighths": (6, 4, 8),  # of K: from here on a row walks every column
    "batch_sixteenths": (4, 1, 8, 16),  # of M K: from here on rows are tiled
    "stripe": (2, 1, 4),  # blocks
    "l2_eighths": (4, 2, 8),  # of the target's L2, for a tile of rows
}
WIDE = 4  # rows from which tiles pay, where enough columns are active


def layout() -> str:
    return "columns_2bit"


def value(sums, row, j, lanes: int):
    return vector.load(sums, row, j, lanes=lanes)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    *,
    form: Form,
    most_eighths: int = 6,
    batch_sixteenths: int = 4,
    stripe: int = 2,
    l2_eighths: int = 4,
) -> PrimFunc:
    small_blocks = -(-n // tiles_neon.BLOCK)
    sizes = tiles_neon.Tiles.of(form, k, target, 4, l2_eighths)

    def multiply(output, q, w, rows, first, share):
        last = T.min(FIELDS * (first + share), small_blocks)
        unpack = partial(columns_neon.unpack, w, k, form)
        tiles_neon.tile_rows(output, unpack, q, rows, FIELDS * first, last, sizes)

    columns = Walk(BLOCK, GROUP, partial(columns_neon.walk, form=form), value)
    tiles = Tiles(
        lambda rows, active: T.And(rows >= WIDE, active * 16 >= rows * k * batch_sixteenths),
        multiply,
        lambda rows, share: T.if_then_else(rows < WIDE, share, stripe),
    )
    return walk.kernel(n, k, columns, tiles, most_eighths)
