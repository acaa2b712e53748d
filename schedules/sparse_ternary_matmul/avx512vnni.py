"""sparse_ternary_matmul on AVX-512 VNNI: a walk over the active columns, or tiles of many rows.

A block is 256 outputs, 64 bytes of a column. Bytes of any four columns are interleaved to quads;
masked by 3 << 2f they are field f's codes times 4**f for `vpdpbusd`, as in
ternary_matmul/avx512vnni.py. The layout orders bytes so that quads come out in output order.

    walk (walk.py says of what):
        for group of 8 listed columns:              the group AHEAD groups on is prefetched
            for b in blocks:                        sums[blocks, 256] in L1: 10 KB
                sums[b] += dot(codes of the columns, q)     two quads, 16 registers
    tiled:
        for m0 in M/TILE_M:                         codes serve every row of the tile
            qs[TILE_M, 4Q]
            for b in share:                         sums[TILE_M, 256]
                for slab in K/1024:
                    codes[16, 16, 16, 64]           256 KB, within L2
                    sums += codes * qs              multiply: 6 rows x 4 fields of 16, registers

    tile         | value        | bound by
    AHEAD        | 2            | groups that cover the latency of memory: knob
    most         | 6/8 of K     | reading on beats following the list: knob
    batch        | 4/16 of M K  | active from here on: rows are tiled: knob
    TILE_M       | of l2_bytes  | rows of q in half of L2

A walk's sums may wrap, being exact modulo 2**32: what `value` shifts, at most 4**3 * 2 * 128 K, is
within 32 bits for K < 2**17.
Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, 2560 x 6912, cold, two threads, medians
of interleaved calls, us at 50, 84, 92 % zeros: 201, 73, 44, against 211 of the dense kernel (split
by outputs 216, 92, 49; ahead 0 half as long again; 1 and 4 as 2). 128 rows, 84 % zeros: 3.7 ms
(avx2.py 10.4).
"""

from collections.abc import Callable
from functools import partial
from itertools import product

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import avx2, avx512
from schedules.layouts import num_quads
from schedules.sparse_ternary_matmul import walk
from schedules.sparse_ternary_matmul.walk import Tiles, Walk
from schedules.targets import CpuTarget
from schedules.ternary_matmul.quads_avx512 import (
    masks,
    quad_of,
    sum_row,
    tile_height,
)
from schedules.ternary_matmul.rows_x86 import copy_row

BLOCK = 256  # outputs in a block of the layout
FIELDS = 4
LANES = 16  # outputs of a register of sums
GROUPS = BLOCK // LANES  # registers of sums of a block, by [field][quarter]
COLUMNS = 8  # that a walk takes at once
TILED_ROWS = 8  # as few as these are walked
ROWS = 6  # rows of a tile that share codes in registers
SLAB = 16  # groups of 16 quads whose codes lie in L2
WALK_KNOBS = {
    "ahead": (2, 1, 4, 0),
    "most_eighths": (6, 4, 8),  # of K: from here on a row walks every column
}
KNOBS = {
    **WALK_KNOBS,
    "batch_sixteenths": (4, 1, 8, 16),  # of M K: from here on rows are tiled
}
# (sums, codes, qs, height, first group of the slab, groups in it) adds a slab's products
Multiply = Callable[..., None]


def layout() -> str:
    return "columns_256"


def codes_of(columns: list[Expr], field_masks: list[Expr]) -> list[Expr]:
    """Codes of four columns, a register for each group of 16 outputs, times 4**field"""
    quads = avx512.columns_to_quads(columns)
    return [T.Bind(quad & mask) for mask in field_masks for quad in quads]


def walk_group(sums, row, w, columns, later, pairs, field_masks, b):
    """sums[row] += what a group of columns adds to block b"""
    found = [T.Bind(avx2.load(sums, row, LANES * g, lanes=LANES)) for g in range(GROUPS)]
    for quad, activations in enumerate(pairs):
        at = columns[4 * quad :][:4]
        bytes_ = [T.Bind(avx2.load(w, column, b, 0, lanes=avx512.LINE)) for column in at]
        for column in later[quad]:
            avx2.prefetch(w, column, b, 0)
        for g, code in enumerate(codes_of(bytes_, field_masks)):
            found[g] = T.Bind(avx512.dot_bytes(found[g], code, activations))
    for g, value in enumerate(found):
        avx2.store(sums, row, LANES * g, value=value, lanes=LANES)


def walk_columns(sums, row, w, column, qs, count, first, blocks, ahead: int):
    """sums[row + b] = sums over `count` listed columns of block first + b, field f's times 4**f.
    Of bytes that keep field f and all above, the first is not masked; the next is taken off."""
    field_masks = [T.Bind(avx2.splat("uint8", 0xFF << 2 * f & 0xFF, 64)) for f in range(FIELDS)]
    clear_sums(sums, row, blocks)
    with T.serial(T.ceildiv(count, COLUMNS)) as group:
        i = group * COLUMNS
        columns = [T.Bind(T.cast(column[i + c], "int64")) for c in range(COLUMNS)]
        later = [
            [
                T.Bind(T.cast(column[i + far * COLUMNS + (quad + c)], "int64"))
                for far, c in product(avx2.ask_at(ahead), range(4))
            ]
            for quad in range(0, COLUMNS, 4)
        ]
        pairs = [T.Bind(quad_of(qs, i + quad)) for quad in range(0, COLUMNS, 4)]
        with T.serial(blocks) as b:
            walk_group(sums, row + b, w, columns, later, pairs, field_masks, first + b)
    with T.serial(blocks) as b, T.serial(GROUPS - GROUPS // FIELDS) as g:
        above = avx2.load(sums, row + b, LANES * g + BLOCK // FIELDS, lanes=LANES)
        avx2.add(sums, row + b, LANES * g, value=-above, lanes=LANES)


def clear_sums(sums, first, rows):
    with T.serial(rows) as r, T.serial(GROUPS) as g:
        zero = avx2.splat("int32", 0, LANES)
        avx2.store(sums, first + r, LANES * g, value=zero, lanes=LANES)


def value(sums, row, j, lanes: int) -> Expr:
    """Sums of outputs from j on of the block in sums[row]"""
    shift = 2 * (j // (BLOCK // FIELDS))
    found = avx2.load(sums, row, j, lanes=lanes)
    return T.shift_right(found, T.broadcast(shift, lanes) if lanes > 1 else shift)


def unpack(codes, w, b, kk0, count, k: int):
    """codes[kk, group, quad % 16] = 64 bytes of each quad of the slab; past K any column, q is 0"""
    field_masks = masks()
    with T.serial(count) as kk, T.serial(16) as row:
        first = ((kk0 + kk) * 16 + row) * 4
        at = [T.min(first + c, k - 1) for c in range(4)]
        bytes_ = [T.Bind(avx2.load(w, column, b, 0, lanes=avx512.LINE)) for column in at]
        for g, code in enumerate(codes_of(bytes_, field_masks)):
            avx2.store(codes, kk, g, row, 0, value=code, lanes=avx512.LINE)


def multiply_rows(sums, codes, qs, r, rows: int, kk0, count):
    """sums[r : r + rows] += rows of qs times the codes, four groups of outputs at a time"""
    with T.serial(GROUPS // 4) as g0:
        found = T.alloc_buffer((4 * rows, LANES), "int32", scope="local")  # registers
        places = [(i, j) for i in range(rows) for j in range(4)]
        for at, (i, j) in enumerate(places):
            so_far = avx2.load(sums, r + i, LANES * (4 * g0 + j), lanes=LANES)
            avx2.store(found, at, 0, value=so_far, lanes=LANES)
        with T.serial(count) as kk, T.serial(16) as row:
            quad = (kk0 + kk) * 16 + row
            four = [
                T.Bind(avx2.load(codes, kk, 4 * g0 + j, row, 0, lanes=avx512.LINE))
                for j in range(4)
            ]
            activations = [T.Bind(quad_of(qs, r + i, 4 * quad)) for i in range(rows)]
            for at, (i, j) in enumerate(places):
                total = avx512.dot_bytes(
                    avx2.load(found, at, 0, lanes=LANES), four[j], activations[i]
                )
                avx2.store(found, at, 0, value=total, lanes=LANES)
        for at, (i, j) in enumerate(places):
            total = avx2.load(found, at, 0, lanes=LANES)
            avx2.store(sums, r + i, LANES * (4 * g0 + j), value=total, lanes=LANES)


def multiply(sums, codes, qs, height, kk0, count):
    with T.serial(height // ROWS) as r:
        multiply_rows(sums, codes, qs, ROWS * r, ROWS, kk0, count)
    with T.serial(height % ROWS) as i:
        multiply_rows(sums, codes, qs, height // ROWS * ROWS + i, 1, kk0, count)


def clear_rows(qs, first, count):
    """Zeros in `count` rows of qs from `first` on"""
    with T.serial(count) as r, T.serial(int(qs.shape[1]) // avx512.LINE) as v:
        zeros = T.broadcast(T.int8(0), avx512.LINE)
        avx2.store(qs, first + r, avx512.LINE * v, value=zeros, lanes=avx512.LINE)


def tile_rows(
    output, q, w, rows, first, blocks, k: int, tile_m: int, multiply: Multiply, multiple: int = 1
):
    """All rows of q, tile by tile, for `blocks` blocks from `first` on. `multiply` may touch rows
    up to a multiple: they are written here, for TVM cuts a buffer down to what it sees in use."""
    groups = num_quads(k) // 16
    qs = T.alloc_buffer((tile_m, 4 * num_quads(k)), "int8")
    totals = T.alloc_buffer((tile_m,), "int32")
    codes = T.alloc_buffer((SLAB, GROUPS, 16, 64), "uint8")
    sums = T.alloc_buffer((tile_m, BLOCK), "int32")
    with T.serial(T.ceildiv(rows, tile_m)) as m0:
        m = m0 * tile_m
        height = T.Bind(T.min(rows - m, tile_m))
        with T.serial(height) as r:
            copy_row(qs, r, q, m + r, k)
            sum_row(totals, r, qs, r)
        clear_rows(qs, height, -height % multiple)
        with T.serial(blocks) as b:
            clear_sums(sums, 0, T.ceildiv(height, multiple) * multiple)
            with T.serial(-(-groups // SLAB)) as slab:
                count = T.Bind(T.min(groups - slab * SLAB, SLAB))
                unpack(codes, w, first + b, slab * SLAB, count, k)
                multiply(sums, codes, qs, height, slab * SLAB, count)
            with T.serial(height) as r:

                def finished(j, lanes):
                    return value(sums, r, j, lanes) - totals[r]

                output.store(m + r, first + b, BLOCK, finished)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    *,
    ahead: int = 2,
    most_eighths: int = 6,
    batch_sixteenths: int = 4,
) -> PrimFunc:
    tile_m = tile_height(k, ROWS, target)
    tiles = Tiles(
        lambda rows, active: T.And(rows >= TILED_ROWS, active * 16 >= rows * k * batch_sixteenths),
        partial(tile_rows, k=k, tile_m=tile_m, multiply=multiply),
    )
    return walk.kernel(n, k, walk_of(ahead), tiles, most_eighths)


def walk_of(ahead: int) -> Walk:
    return Walk(BLOCK, COLUMNS, partial(walk_columns, ahead=ahead), value, ahead)
