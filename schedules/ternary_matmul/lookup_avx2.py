"""ternary_matmul with 4-bit activations on AVX2: two weights are a nibble, a look-up 64 products.

Output-stationary. The nine sums of two activations and two ternary weights, plus 16, are a table of
bytes; `vpshufb` looks 32 outputs' sums up at once, and seven of them fit a byte.

    for thread in threads:                              parallel, a share of the blocks each
        for m0 in M/TILE_M:
            table[TILE_M, P, 16]                        L2, each thread its own
            for b0 in blocks of the share, by streams:  164 KB of weights at K = 2560, L2
                tile(1 block, wide rows)                whole tiles of rows: a nibble serves them
                tile(streams blocks, 1 row)             rows left: several streams of cold weights

    tile(S, R): out[R, 64 S]
        for drain in P/(7*292):                         sum32: L1
            for group in 292:                           sum16: L1, even and odd bytes apart
                sum8 = sum of lookup(table[row, pair], nibble) over 7 pairs: 2 S R registers

    tile      | value          | bound by
    S * R     | 4              | 16 registers: 8 of sums, 2 of nibbles, mask, table
    streams,  | 4, 4           | S and R of the two tiles: fewer leave registers idle, more spill
    wide      |                |
    prefetch  | 2048           | bytes ahead in a stream, over the end of a page
    TILE_M    | of l2_bytes    | tables of a tile of rows in `l2_eighths` / 8 of L2
    7 pairs   | 7 * 32 = 224   | uint8
    292       | 292 * 224      | uint16

With q in [-8, 7] a sum of two products is within 16 of 0, so entries are 0 to 32.

Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, cold, best of 9 interleaved runs: 2560 x
2560, two threads 90 us (without prefetch 106); 6912 x 2560, one thread 391 us (488).
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, threads
from schedules.layouts import PAIR_GROUP, num_pairs
from schedules.targets import CpuTarget

BLOCK = 64  # rows of weights in a block of the layout
# streams: blocks of weights a tile takes at once; wide: rows of activations; l2_eighths: of the
# target's L2, for tables; prefetch: bytes ahead in a stream
KNOBS = {
    "streams": (4, 2, 1),
    "wide": (4, 2, 1),
    "l2_eighths": (4, 2, 8, 32),
    "prefetch": (2048, 0),
}
BIAS = 16
GROUPS_PER_DRAIN = 0xFFFF // (PAIR_GROUP * 2 * BIAS)
FIRST = [i // 3 - 1 if i < 9 else 0 for i in range(16)]  # weight of a pair's first activation
SECOND = [i % 3 - 1 if i < 9 else 0 for i in range(16)]


def fill_entry(table, r, p, first, second):
    """table[r, p, i] = BIAS + FIRST[i] * first + SECOND[i] * second"""
    entry = (
        T.broadcast(T.int8(BIAS), 16)
        + avx2.sign_half(T.broadcast(first, 16), avx2.constant("int8", FIRST))
        + avx2.sign_half(T.broadcast(second, 16), avx2.constant("int8", SECOND))
    )
    avx2.store(table, r, p, 0, value=T.reinterpret("uint8x16", entry), lanes=16)


def fill_table(table, r, q, m, k):
    """Row r of the table from row m of q; pairs past K are of zeros."""
    with T.serial(k // 2) as p:
        fill_entry(table, r, p, q[m, 2 * p], q[m, 2 * p + 1])
    if k % 2:
        fill_entry(table, r, k // 2, q[m, k - 1], T.int8(0))
    with T.serial(num_pairs(k) - (k + 1) // 2) as p:
        fill_entry(table, r, (k + 1) // 2 + p, T.int8(0), T.int8(0))


def group_sums(w, table, b, r, g, blocks, rows, prefetch):
    """Sums over a group of pairs, uint8x32 by [block][row][half], each in a register"""
    sums = [None] * (2 * blocks * rows)
    for p in range(PAIR_GROUP):
        for s in range(blocks):
            nibbles = T.Bind(avx2.load(w, b + s, g * PAIR_GROUP + p, 0, lanes=32))
            # a line is two pairs, seven pairs some four lines
            for far in avx2.ask_at(prefetch, 64) if p % 2 == 0 else ():
                avx2.prefetch(w, b + s, g * PAIR_GROUP + p + far // 32, 0)
            halves = [T.Bind(avx2.low_nibbles(nibbles)), T.Bind(avx2.high_nibbles(nibbles))]
            for i in range(2 * rows):
                entry = avx2.load(table, r + i // 2, g * PAIR_GROUP + p, 0, lanes=16)
                found, at = avx2.lookup(entry, halves[i % 2]), 2 * rows * s + i
                sums[at] = T.Bind(avx2.add_bytes(sums[at], found) if p else found)
    return sums


def widen(sum16, i, bytes_):
    """sum16[2i] += bytes two by two, sum16[2i + 1] += the odd bytes alone"""
    both = T.Bind(T.reinterpret("uint16x16", bytes_))
    avx2.add(sum16, 2 * i, 0, value=both, lanes=16)
    odd = T.shift_right(both, T.broadcast(T.uint16(8), 16))
    avx2.add(sum16, 2 * i + 1, 0, value=odd, lanes=16)


def drain(sum32, sum16, count):
    """sum32[i, :] += the 32 sums of sum16[2i] and sum16[2i + 1], in the order of their bytes"""
    for i in range(count):  # unrolled, so that sum16 can be registers
        both, odd = (avx2.load(sum16, 2 * i + j, 0, lanes=16) for j in (0, 1))
        even = both - T.shift_left(odd, T.broadcast(T.uint16(8), 16))
        low, high = avx2.interleave_low(even, odd, 16), avx2.interleave_high(even, odd, 16)
        for j, half in enumerate((T.vectorlow, T.vectorhigh)):
            for c, words in enumerate((low, high)):
                words = T.cast(half("uint16x8", words), "int32x8")
                avx2.add(sum32, i, 16 * j + 8 * c, value=words, lanes=8)


def accumulate(sum32, w, table, b, r, blocks, rows, prefetch):
    """sum32[2 * (block * rows + row) + half, 32] = sums over all of K, BIAS a pair too large"""
    groups = w.shape[1] // PAIR_GROUP
    count = 2 * blocks * rows
    sum16 = T.alloc_buffer((2 * count, 16), "uint16")
    with T.serial(count * 4) as i:
        avx2.store(sum32, i // 4, i % 4 * 8, value=T.broadcast(T.int32(0), 8), lanes=8)
    with T.serial(T.ceildiv(groups, GROUPS_PER_DRAIN)) as d:
        avx2.clear(sum16, 2 * count, "uint16", 16)
        with T.serial(T.min(GROUPS_PER_DRAIN, groups - d * GROUPS_PER_DRAIN)) as g:
            group = d * GROUPS_PER_DRAIN + g
            found = group_sums(w, table, b, r, group, blocks, rows, prefetch)
            for i, bytes_ in enumerate(found):
                widen(sum16, i, bytes_)
        drain(sum32, sum16, count)


def tile(output, w, table, m0, b, r, blocks, rows, prefetch=0):
    """Outputs of `blocks` blocks from b on and `rows` rows from m0 + r on"""
    bias = BIAS * int(w.shape[1])
    sum32 = T.alloc_buffer((2 * blocks * rows, 32), "int32", scope="local")
    accumulate(sum32, w, table, b, r, blocks, rows, prefetch)
    with T.serial(blocks * rows) as i:

        def sums(j, lanes):
            return avx2.load(sum32, 2 * i + j // 32, j % 32, lanes=lanes) - bias

        output.store(m0 + r + i % rows, b + i // rows, BLOCK, sums)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    epilogue: str,
    *,
    streams: int = 4,
    wide: int = 4,
    l2_eighths: int = 4,
    prefetch: int = 2048,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    blocks, pairs = -(-n // BLOCK), num_pairs(k)
    tile_m = max(wide, target.l2_bytes * l2_eighths // 8 // (16 * pairs) // wide * wide)
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((blocks, pairs, 32), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        with T.sblock("root"):
            tasks = T.min(threads.count(), blocks)
            for task in T.parallel(tasks):
                table = T.alloc_buffer((tile_m, pairs, 16), "uint8")
                first = threads.share(blocks, task, tasks)
                last = threads.share(blocks, task + 1, tasks)
                for m0 in T.serial(T.ceildiv(rows, tile_m)):
                    m = T.meta_var(T.cast(m0 * tile_m, "int32"))
                    height = T.min(T.cast(rows, "int32") - m, tile_m)
                    for r in T.serial(height):
                        fill_table(table, r, q, m + r, k)
                    for b0 in T.serial(T.ceildiv(last - first, streams)):
                        b = T.meta_var(first + streams * b0)
                        width = T.min(last - b, streams)
                        for r in T.serial(height // wide):
                            for s in T.serial(width):
                                tile(output, w, table, m, b + s, wide * r, 1, wide)
                        for r0 in T.serial(height % wide):
                            r = T.meta_var(height // wide * wide + r0)
                            if width == streams:
                                tile(output, w, table, m, b, r, streams, 1, prefetch)
                            else:
                                for s in T.serial(width):
                                    tile(output, w, table, m, b + s, r, 1, 1, prefetch)

    return end.finish(ternary_matmul)
