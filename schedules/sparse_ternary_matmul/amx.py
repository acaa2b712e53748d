"""sparse_ternary_matmul on AMX: prompts by tiles of 16 x 16 outputs, few rows as avx512vnni.py.

avx512vnni.py's nest with another product of a slab: 32 rows and two groups of 16 outputs at a
time, four tiles of sums that are loaded and stored once a slab of 1024 columns.

    tile       | value | bound by
    TILED_ROWS | 16    | a tile; at 84 % zeros and 128 rows avx512vnni.py's walk takes 0.86 of its
               |       | time here, which a record may choose

    skip_zeros | layout         | kernel
    1          | `columns_256`  | this
    0          | `triples_5bit` | ternary_matmul's of the row, the residual added (dense.py)

Measured: Sapphire Rapids class Xeon, 2 cores, busy, 2026-11-22, 2560 x 6912, 128 rows, two threads:
4.3 ms (avx2.py 10.4 at 84 % zeros). A loop of tile loads and products alone ran there at 77 cycles
a step of four products, or at 150 to 340, from run to run: to be measured again on a quiet machine.
"""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import amx
from schedules.sparse_ternary_matmul import avx512vnni, walk
from schedules.sparse_ternary_matmul.avx512vnni import BLOCK, GROUPS, LANES
from schedules.sparse_ternary_matmul.dense import ACT_BITS, with_lists
from schedules.sparse_ternary_matmul.walk import Tiles
from schedules.targets import CpuTarget
from schedules.ternary_matmul import amxvbmi
from schedules.ternary_matmul.amx import ACTIVATIONS, CODES, HEIGHT, SUMS
from schedules.ternary_matmul.quads_avx512 import tile_height

TILED_ROWS = amx.ROWS
KNOBS = {"skip_zeros": (1, 0), **avx512vnni.WALK_KNOBS}


def layout(*, skip_zeros: int = 1) -> str:
    return avx512vnni.layout() if skip_zeros else amxvbmi.layout(ACT_BITS)


def multiply(sums, codes, qs, height, kk0, count):
    row_bytes = int(qs.shape[1])
    places = [(at, amx.ROWS * (at // 2), at % 2) for at in SUMS]
    with T.serial(T.ceildiv(height, HEIGHT)) as r0, T.serial(GROUPS // 2) as g0:
        r, g = r0 * HEIGHT, 2 * g0
        for tile, row, j in places:
            amx.load(tile, sums, r + row, LANES * (g + j), row_bytes=4 * BLOCK)
        with T.serial(count) as kk:
            for i, tile in enumerate(ACTIVATIONS):
                amx.load(tile, qs, r + amx.ROWS * i, 64 * (kk0 + kk), row_bytes=row_bytes)
            for j, tile in enumerate(CODES):
                amx.load(tile, codes, kk, g + j, 0, 0, row_bytes=amx.ROW_BYTES)
            for tile, row, j in places:
                amx.dot_bytes(tile, ACTIVATIONS[row // amx.ROWS], CODES[j])
        for tile, row, j in places:
            amx.store(tile, sums, r + row, LANES * (g + j), row_bytes=4 * BLOCK)


def tile_rows(output, q, w, rows, first, blocks, k: int, tile_m: int):
    """As avx512vnni.py's, with the tile registers of this thread at hand."""
    palette = T.alloc_buffer((64,), "uint8")
    amx.request()
    amx.configure(palette)
    avx512vnni.tile_rows(output, q, w, rows, first, blocks, k, tile_m, multiply, HEIGHT)
    amx.release()


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    *,
    skip_zeros: int = 1,
    ahead: int = 2,
    most_eighths: int = 6,
) -> PrimFunc:
    if not skip_zeros:
        return with_lists(amxvbmi.kernel(n, k, ACT_BITS, target, "residual"))
    tile_m = tile_height(k, HEIGHT, target)
    tiles = Tiles(lambda rows, active: rows >= TILED_ROWS, partial(tile_rows, k=k, tile_m=tile_m))
    return walk.kernel(n, k, avx512vnni.walk_of(ahead), tiles, most_eighths)
