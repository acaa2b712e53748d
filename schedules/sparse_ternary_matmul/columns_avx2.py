"""Columns of ternary weights times 8-bit activations on AVX2: a walk over listed ones, and all of
them for many rows.

A block is 128 outputs, 32 bytes of a column; a 2-bit field of them is 32 outputs' codes {0, 1, 2}.
The caller takes sum(q) off.

    walk:   for drain in columns/120:               sum32[share, 128]: L1
                for group of 8 columns in 15:       eight runs of memory, each a share long
                    for b in share:                 sum16[share, 8, 16]: L1; 8 registers within
                        for pair in 4:              bytes of two columns, interleaved
                            sum16 += multiply_add(codes(pair, b), q pair)
    tiled:  for m0 in M/TILE_M:
                qs[TILE_M, K] = rows of q
                for b in share:                     sum32[TILE_M, 128]
                    for chunk in K/128:
                        codes[32, 16, 32]           16 KB, L1: bytes of four columns, interleaved
                        multiply_chunk              ternary_matmul/quads_avx2.py

    tile       | value    | bound by
    60 pairs   | 60 * 512 | int16: a pair adds at most 2 * 128 * 2
    4 pairs    | 8 columns| runs of memory at once; loads of sum16 a pair
    TILE_M     | 64       | unpacking costs what a row costs
"""

from tvm.script import tirx as T

from schedules.intrin import avx2
from schedules.layouts import num_quads
from schedules.ternary_matmul import quads_avx2
from schedules.ternary_matmul.quads_avx2 import TILE_M
from schedules.ternary_matmul.rows_avx2 import sum_row
from schedules.ternary_matmul.rows_x86 import copy_row

BLOCK = 128  # outputs in a block of the layout
FIELDS = 4
GROUP = 4  # pairs of columns that a walk takes at once
COLUMNS = 2 * GROUP
PAIRS_PER_DRAIN = 0x7FFF // (2 * 2 * 128) // GROUP * GROUP
CHUNK = 32  # quads
TILED_ROWS = 4  # rows from which on they are tiled


def codes(first, second):
    """Codes of two columns side by side, uint8x32 by [field][half]."""
    mask = T.broadcast(T.uint8(3), 32)
    sides = [
        T.Bind(side(first, second, 32)) for side in (avx2.interleave_low, avx2.interleave_high)
    ]
    for f in range(FIELDS):
        for side in sides:
            yield avx2.shift_bytes(side, -2 * f) & mask


def activation_pair(qs, *index):
    """Two neighbours of int8 in every 16 bits."""
    pair = T.reinterpret("int16", avx2.load(qs, *index, lanes=2))
    return T.reinterpret("int8x32", T.broadcast(pair, 16))


def drain(sum32, row, column, low, high):
    """sum32[row, column :][:32] += int16 sums of both halves, in the order of the outputs"""
    for j, half in enumerate((T.vectorlow, T.vectorhigh)):
        for c, words in enumerate((low, high)):
            words = T.cast(half("int16x8", words), "int32x8")
            avx2.add(sum32, row, column + 16 * j + 8 * c, value=words, lanes=8)


def clear_rows(buffer, first, rows, columns: int, dtype: str, lanes: int):
    with T.serial(rows) as i, T.serial(columns // lanes) as j:
        zero = avx2.splat(dtype, 0, lanes)
        avx2.store(buffer, first + i, lanes * j, value=zero, lanes=lanes)


def walk_group(sum16, w, columns, later, pairs, first, b):
    """sum16[b, 8, 16] += what a group of columns adds to block first + b"""
    sums = [T.Bind(avx2.load(sum16, b, 16 * v, lanes=16)) for v in range(2 * FIELDS)]
    for column in later:
        avx2.prefetch(w, column, first + b, 0)
    for p, pair in enumerate(pairs):
        bytes_ = [avx2.load(w, column, first + b, 0, lanes=32) for column in columns[2 * p :][:2]]
        for v, code in enumerate(codes(*bytes_)):
            sums[v] = T.Bind(avx2.add_words(sums[v], avx2.multiply_add_bytes(code, pair)))
    for v, value in enumerate(sums):
        avx2.store(sum16, b, 16 * v, value=value, lanes=16)


def walk(sum32, row, w, column, qs, count, first, blocks, ahead: int = 0):
    """sum32[row + b] = sums of `count` listed columns for `blocks` blocks from `first` on; the
    list goes on for `ahead` groups more, which are prefetched"""
    sum16 = T.alloc_buffer((w.shape[1], BLOCK), "int16")
    groups = T.Bind(T.ceildiv(count, COLUMNS))
    per_drain = PAIRS_PER_DRAIN // GROUP
    clear_rows(sum32, row, blocks, BLOCK, "int32", 8)
    with T.serial(T.ceildiv(groups, per_drain)) as d:
        clear_rows(sum16, 0, blocks, BLOCK, "int16", 16)
        with T.serial(T.min(per_drain, groups - d * per_drain)) as g:
            i = (d * per_drain + g) * COLUMNS
            # as int64, so that the eight addresses are computed once and not for every block
            columns = [T.Bind(T.cast(column[i + c], "int64")) for c in range(COLUMNS)]
            aheads = [far * COLUMNS for far in avx2.ask_at(ahead)]
            later = [column[i + far + c] for far in aheads for c in range(COLUMNS)]
            later = [T.Bind(T.cast(c, "int64")) for c in later]
            pairs = [T.Bind(activation_pair(qs, i + 2 * p)) for p in range(GROUP)]
            with T.serial(blocks) as b:
                walk_group(sum16, w, columns, later, pairs, first, b)
        with T.serial(blocks) as b:
            for f in range(FIELDS):
                low, high = (avx2.load(sum16, b, 32 * f + 16 * c, lanes=16) for c in (0, 1))
                drain(sum32, row + b, 32 * f, low, high)


def drain_vector(sum32, row, v, value):
    """sum32[row] += int32 sums of vector v: four outputs, and the four that lie 16 behind"""
    for half, four in enumerate(avx2.halves(value, "int32x4")):
        column = 32 * (v // FIELDS) + 4 * (v % FIELDS) + 16 * half
        avx2.add(sum32, row, column, value=four, lanes=4)


def quads_of(columns: list) -> list:
    """Bytes of four columns side by side, four registers of outputs as `drain_vector` has them"""
    quads = []
    sides = (avx2.interleave_low, avx2.interleave_high)
    for side in sides:
        pairs = [side(columns[c], columns[c + 1], 32) for c in (0, 2)]
        first, second = (T.Bind(T.reinterpret("int16x16", pair)) for pair in pairs)
        quads += [T.reinterpret("uint8x32", T.Bind(half(first, second, 16))) for half in sides]
    return quads


def unpack(codes, w, b, quad0, quads, k: int):
    """codes[:quads, 16, 32] = block b's from a quad on; columns past K meet q = 0"""
    with T.serial(quads) as i:
        columns = [T.min(4 * (quad0 + i) + c, k - 1) for c in range(4)]
        bytes_ = [T.Bind(avx2.load(w, column, b, 0, lanes=32)) for column in columns]
        for v, quad in enumerate(quads_of(bytes_)):
            for f in range(FIELDS):
                field = quads_avx2.masked(avx2.shift_bytes(quad, -2 * f), 0)
                avx2.store(codes, i, FIELDS * f + v, 0, value=field, lanes=32)


def tile_block(output, w, qs, totals, codes, sum32, m, b, height, k, products, wide):
    """All outputs of block b and of `height` rows from m on"""
    quads = int(qs.shape[1]) // 4
    with T.serial(height) as r:
        quads_avx2.clear_row(sum32, r)
    with T.serial(-(-quads // CHUNK)) as c:
        some = T.Bind(T.min(CHUNK, quads - CHUNK * c))
        unpack(codes, w, b, CHUNK * c, some, k)
        quads_avx2.multiply_chunk(
            sum32, codes, qs, height, CHUNK * c, some, products, wide, drain_vector
        )
    with T.serial(height) as r:
        quads_avx2.finish(output, sum32, r, totals[r], m + r, b)


def tile_rows(output, q, w, rows, first, blocks, k, products, wide):
    """All rows of q, tile by tile, for `blocks` blocks from `first` on"""
    qs = T.alloc_buffer((TILE_M, 4 * num_quads(k)), "int8")
    totals = T.alloc_buffer((TILE_M,), "int32")
    codes = T.alloc_buffer((CHUNK, 4 * FIELDS, 32), "uint8")
    sum32 = T.alloc_buffer((TILE_M, BLOCK), "int32")
    with T.serial(T.ceildiv(rows, TILE_M)) as m0:
        m = m0 * TILE_M
        height = T.Bind(T.min(rows - m, TILE_M))
        with T.serial(height) as r:
            copy_row(qs, r, q, m + r, k)
            sum_row(totals, r, qs, r)
        with T.serial(blocks) as b:
            tile_block(output, w, qs, totals, codes, sum32, m, first + b, height, k, products, wide)
