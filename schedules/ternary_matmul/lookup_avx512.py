"""ternary_matmul of a few rows on AVX-512 VBMI: a look-up is three products of each of 64 outputs.

The 27 sums of three activations in [-8, 8] and three ternary weights, plus 24, are a table of
bytes; `vpermb` looks 64 outputs' sums up at once, and five of them fit a byte. 8-bit activations
are 16 high + low, two such rows with tables of their own and the same indexes.

    for rows of the tile:                               tables of TILE_M rows within L2
        table[2 or 1, G, 8, 32] = sums of three         3 vpermb for two tables
    M = 1:  for b in share/STREAMS:                     streams far apart, each one long run
        tile(STREAMS blocks, one row)
    M > 1:  for b in share by WIDE_BLOCKS, rows by WIDE_TABLES:
        tile(WIDE_BLOCKS blocks, WIDE_TABLES tables)    an index serves all tables

    tile(S, R): out[R, 64 S]
        for drain in G/170:                             sum32: L1
            for half in group of 24 columns:            sum16: 2 S R registers, even and odd bytes
                sum8 = sum of lookup(table[row, triple], index) over 4 triples

    tile        | value      | bound by
    STREAMS     | 4          | 32 registers: 8 or 16 of sums, 4 or 8 of tables, 4 of indexes: knob
    PREFETCH    | 2048       | bytes ahead in a stream, over the end of a page: knob
    WIDE_BLOCKS | 2          | a table's way from L2 serves two look-ups
    WIDE_TABLES | 4          | registers: 16 of sums, 8 of indexes, 4 of tables
    4 triples   | 4 * 48     | uint8
    170 groups  | 170 * 384  | uint16

Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, cold, interleaved, medians of 41 to 61
paired ratios to the 2-bit kernel on `vpdpbusd`: one token, 6912 x 2560, one and two threads 0.86
and 0.87 (INT8 0.89, 0.88); 2560 x 2560, two threads, 4 tokens 0.46 (0.70), 8 tokens 0.75 (1.45).
"""

from itertools import product

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import avx2, avx512
from schedules.layouts import TRIPLE_COLUMNS, TRIPLE_ROWS, TRIPLES
from schedules.ternary_matmul.rows_x86 import copy_row
from schedules.ternary_matmul.triples_avx512 import BLOCK, DIGITS, HALF, LINE, LINES, indexes

TABLE = 32  # entries
BIAS = 24
WIDE_BLOCKS, WIDE_TABLES = 2, 4
GROUPS_PER_DRAIN = 0xFFFF // (len(TRIPLES) * 2 * BIAS)
ZERO = TRIPLE_COLUMNS  # a byte without a column in a register of a group's activations


def digits_of(act_bits: int) -> int:
    """Tables a row: of 4-bit activations, or of high and low ones."""
    return act_bits // 4


def tile_height(k: int, act_bits: int, near_bytes: int) -> int:
    """Rows whose tables take so many bytes."""
    groups = -(-k // TRIPLE_COLUMNS)
    row_bytes = digits_of(act_bits) * groups * len(TRIPLES) * TABLE
    return max(WIDE_TABLES, near_bytes // row_bytes)


def table_index(pair: int, position: int) -> list[int]:
    """Where two tables find their products of a triple's weight in [q, -q], 32 bytes each"""
    found = []
    for triple in TRIPLES[2 * pair : 2 * pair + 2]:
        column = triple[position]
        found += [(TABLE + column, ZERO, column)[DIGITS[position][i]] for i in range(TABLE)]
    return found


def fill_group(table, row, g, activations: Expr, digits: int):
    """table[row : row + digits, g] from 24 activations; what follows them is ignored"""
    is_column = avx2.constant("int8", [-1] * TRIPLE_COLUMNS + [0] * (TABLE - TRIPLE_COLUMNS))
    eight = T.broadcast(T.int8(BIAS // 3), TABLE)
    for digit, part in enumerate(split(T.Bind(activations & is_column), digits)):
        both = T.Bind(T.vectorcombine("int8x64", eight + part, eight - part))
        for pair in range(len(TRIPLES) // 2):
            sums = None
            for position in range(3):
                index = avx2.constant("int8", table_index(pair, position))
                product = avx512.permute_bytes(both, index)
                sums = product if sums is None else sums + product
            value = T.reinterpret("uint8x64", sums)
            avx2.store(table, row + digit, g, LINE * pair, value=value, lanes=LINE)


def split(activations: Expr, digits: int) -> list[Expr]:
    """[low, high] in [-8, 8] with q = low + 16 high, of int8x32; or q itself"""
    if digits == 1:
        return [activations]
    wide = T.Bind(T.cast(activations, "int16x32"))
    high = T.Bind(
        T.shift_right(wide + T.broadcast(T.int16(8), TABLE), T.broadcast(T.int16(4), TABLE))
    )
    low = wide - T.shift_left(high, T.broadcast(T.int16(4), TABLE))
    return [T.Bind(T.cast(part, "int8x32")) for part in (low, high)]


def fill_row(table, row, qs, q, m, k: int, digits: int):
    """table[row : row + digits] from row m of q, by way of qs[0], where zeros follow"""
    copy_row(qs, 0, q, m, k)
    with T.serial(table.shape[1]) as g:
        activations = avx2.load(qs, 0, TRIPLE_COLUMNS * g, lanes=TABLE)
        fill_group(table, row, g, activations, digits)


def sum_half(w, table, blocks, rows, g, half: int, prefetch: int):
    """((block, row), sums of four triples as bytes) of blocks of w and rows of table"""
    lines = range(HALF) if half == 0 else range(HALF, LINES)
    found = []
    for b in blocks:
        found.append(indexes(w, b, g, half))
        for r, ahead in product(lines, avx2.ask_at(prefetch, LINE)):
            avx2.prefetch(w, b, g, LINE * r + ahead)
    for j, row in enumerate(rows):
        tables = [
            T.Bind(avx512.repeat(avx2.load(table, row, g, TABLE * (HALF * half + t), lanes=TABLE)))
            for t in range(HALF)
        ]
        for i, index in enumerate(found):
            sums = None
            for t, entries in enumerate(tables):
                looked_up = avx512.permute_bytes(entries, index[t])
                sums = T.Bind(looked_up if sums is None else avx512.add_bytes(sums, looked_up))
            yield len(rows) * i + j, sums


def accumulate(sum16, w, table, blocks, rows, g, prefetch: int):
    """sum16[2i] += bytes two by two, sum16[2i + 1] += the odd bytes, i = len(rows) * block + row"""
    for half in (0, 1):
        for i, sums in sum_half(w, table, blocks, rows, g, half, prefetch):
            both = T.Bind(T.reinterpret("uint16x32", sums))
            avx2.add(sum16[2 * i], 0, value=both, lanes=32)
            odd = T.shift_right(both, T.broadcast(T.uint16(8), 32))
            avx2.add(sum16[2 * i + 1], 0, value=odd, lanes=32)


def drain(sum32, sum16, count: int, digits: int):
    """sum32[i // digits, 64] += the sums of sum16[2i] and sum16[2i + 1], times 16**(i % digits), in
    the order of the rows"""
    found = T.alloc_buffer((2 * count, 32), "uint16")  # for the loop
    for i, sums in enumerate(sum16):
        avx2.store(found, i, 0, value=avx2.load(sums, 0, lanes=32), lanes=32)
    slot_of = {row: slot for slot, row in enumerate(TRIPLE_ROWS)}
    with T.serial(count) as i:
        both, odd = (T.Bind(avx2.load(found, 2 * i + j, 0, lanes=32)) for j in (0, 1))
        even = T.Bind(both - T.shift_left(odd, T.broadcast(T.uint16(8), 32)))
        shift = T.broadcast(4 * (i % digits), 16)
        for first in range(0, BLOCK, 16):
            slots = [slot_of[row] for row in range(first, first + 16)]
            words = T.Shuffle([even, odd], [slot // 2 + 32 * (slot % 2) for slot in slots])
            value = T.shift_left(T.cast(words, "int32x16"), shift)
            avx2.add(sum32, i // digits, first, value=value, lanes=16)


def tile(output, w, table, m, blocks, r, tokens: int, digits: int, prefetch: int = 0):
    """out[m + r : m + r + tokens] of these blocks; token t has tables digits * t on"""
    rows, count = [digits * r + i for i in range(digits * tokens)], len(blocks) * tokens
    groups = int(w.shape[1])
    sum32 = T.alloc_buffer((count, BLOCK), "int32")
    with T.serial(4 * count) as i:
        avx2.store(sum32, i // 4, i % 4 * 16, value=T.broadcast(T.int32(0), 16), lanes=16)
    with T.serial(-(-groups // GROUPS_PER_DRAIN)) as d:
        first = d * GROUPS_PER_DRAIN
        sum16 = avx2.registers(2 * digits * count, "uint16", 32)
        with T.serial(T.min(GROUPS_PER_DRAIN, groups - first)) as g:
            accumulate(sum16, w, table, blocks, rows, first + g, prefetch)
        drain(sum32, sum16, digits * count, digits)
    bias = BIAS * len(TRIPLES) * groups * sum(16**digit for digit in range(digits))
    for at, b in zip(range(0, count, tokens), blocks, strict=True):
        with T.serial(tokens) as t:

            def finished(j, lanes, at=at, t=t):
                return avx2.load(sum32, at + t, j, lanes=lanes) - bias

            output.store(m + r + t, b, BLOCK, finished)


def pick(first, share, j, stride, count: int) -> list[Expr]:
    """Blocks j, j + stride, ... of the share; past its end the last one again, out of the cache:
    one tile of code for all"""
    return [T.Bind(first + T.min(j + stride * i, share - 1)) for i in range(count)]


def one_row(output, w, table, m, first, share, digits: int, streams: int, prefetch: int):
    """out[m] for `share` blocks from `first` on, whose tables are the first"""
    run = T.Bind(T.ceildiv(share, streams))
    with T.serial(run) as j:
        blocks = pick(first, share, j, run, streams)
        tile(output, w, table, m, blocks, 0, 1, digits, prefetch)


def many_rows(output, w, table, m, height, first, share, digits: int):
    """out[m : m + height] for `share` blocks from `first` on"""
    tokens = WIDE_TABLES // digits
    with T.serial(T.ceildiv(share, WIDE_BLOCKS)) as j:
        blocks = pick(first, share, WIDE_BLOCKS * j, 1, WIDE_BLOCKS)
        with T.serial(height // tokens) as r:
            tile(output, w, table, m, blocks, tokens * r, tokens, digits)
        with T.serial(height % tokens) as i:
            tile(output, w, table, m, blocks, height // tokens * tokens + i, 1, digits)


def multiply(output, q, w, num_rows, first, share, k, act_bits, tile_m, streams, prefetch):
    """out[:num_rows] for `share` blocks from `first` on, tables of `tile_m` rows at a time"""
    digits, groups = digits_of(act_bits), int(w.shape[1])
    q_bytes = -(-(TRIPLE_COLUMNS * (groups - 1) + TABLE) // LINE) * LINE
    table = T.alloc_buffer((tile_m * digits, groups, TABLE * len(TRIPLES)), "uint8")
    qs = T.alloc_buffer((1, q_bytes), "int8")
    # of which `copy_row` writes the line if q reaches into it
    avx2.store(qs, 0, q_bytes - LINE, value=T.broadcast(T.int8(0), LINE), lanes=LINE)
    with T.serial(T.ceildiv(num_rows, tile_m)) as tile_index:
        m = tile_index * tile_m
        height = T.Bind(T.min(num_rows - m, tile_m))
        with T.serial(height) as r:
            fill_row(table, digits * r, qs, q, m + r, k, digits)
        with T.If(height == 1):
            with T.Then():
                one_row(output, w, table, m, first, share, digits, streams, prefetch)
            with T.Else():
                many_rows(output, w, table, m, height, first, share, digits)
