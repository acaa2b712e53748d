"""ternary_matmul with 4-bit activations on NEON: two weights are a nibble, a `tbl` 32 products.

Output-stationary, as lookup_avx2.py: the nine sums of two activations and two ternary weights, plus
16, are a table of bytes. A register is 16 bytes, so is a table, and all sums stay in registers.

    for thread in threads:                              parallel, a share of the blocks each
        for m0 in M/TILE_M:
            table[TILE_M, P, 16]                        L2, each thread its own
            for b in blocks of the share:
                tile(wide rows)                         a nibble serves them
                tile(1 row)                             rows left

    tile(R): out[R, 64]
        for drain in P/(7*292):                         sum32: L1
            for group in 292:                           sum16: 8 R registers
                sum8 = sum of lookup(table[row, pair], nibble) over 7 pairs: 4 R registers

    tile    | value          | bound by
    wide    | 2              | 32 registers: 8 of sum8, 16 of sum16, 4 of nibbles, 2 of tables
    TILE_M  | of l2_bytes    | tables of a tile of rows in `l2_eighths` / 8 of L2
    7 pairs | 7 * 32 = 224   | uint8
    292     | 292 * 224      | uint16

Instructions a pair of 64 rows, one row of activations: 12 of nibbles, look-ups and sums, 2 loads
(ldp), 8/7 to widen: 0.12 a weight. Where the epilogue is zero for a gate <= 0, a block of 64 such
gates skips its weights. Counted: docs/log.md, "ARM".
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import neon, threads
from schedules.intrin.lanes import add, clear, constant, load, splat, store
from schedules.layouts import PAIR_GROUP, num_pairs
from schedules.targets import CpuTarget

BLOCK = 64  # rows of weights in a block of the layout
QUARTERS = 4  # registers of 16 rows of a block
BIAS = 16
GROUPS_PER_DRAIN = 0xFFFF // (PAIR_GROUP * 2 * BIAS)
FIRST = [i // 3 - 1 if i < 9 else 0 for i in range(16)]  # weight of a pair's first activation
SECOND = [i % 3 - 1 if i < 9 else 0 for i in range(16)]


def fill_entry(table, r, p, first, second):
    """table[r, p, i] = BIAS + FIRST[i] * first + SECOND[i] * second"""
    entry = (
        splat("int8", BIAS, 16)
        + T.broadcast(first, 16) * constant("int8", FIRST)
        + T.broadcast(second, 16) * constant("int8", SECOND)
    )
    store(table, r, p, 0, value=T.reinterpret("uint8x16", entry), lanes=16)


def fill_table(table, r, q, m, k):
    """Row r of the table from row m of q; pairs past K are of zeros."""
    with T.serial(k // 2) as p:
        fill_entry(table, r, p, q[m, 2 * p], q[m, 2 * p + 1])
    if k % 2:
        fill_entry(table, r, k // 2, q[m, k - 1], T.int8(0))
    with T.serial(num_pairs(k) - (k + 1) // 2) as p:
        fill_entry(table, r, (k + 1) // 2 + p, T.int8(0), T.int8(0))


def group_sums(w, table, b, r, g, rows):
    """Sums over a group of pairs, uint8x16 by [row][quarter], each in a register"""
    sums: dict[tuple[int, int], Expr] = {}
    for p in range(PAIR_GROUP):
        pair = g * PAIR_GROUP + p
        bytes_ = [T.Bind(load(w, b, pair, 16 * h, lanes=16)) for h in (0, 1)]
        nibbles = [T.Bind(f(v)) for f in (neon.low_nibbles, neon.high_nibbles) for v in bytes_]
        for i in range(rows):
            entries = T.Bind(load(table, r + i, pair, 0, lanes=16))
            for j in range(QUARTERS):
                found = neon.lookup(entries, nibbles[j])
                sums[i, j] = T.Bind(sums[i, j] + found if p else found)
    return sums


def accumulate(sum32, w, table, b, r, rows):
    """sum32[row, 64] = sums over all of K, BIAS a pair too large"""
    groups = w.shape[1] // PAIR_GROUP
    sum16 = T.alloc_buffer((2 * QUARTERS * rows, 8), "uint16", scope="local")
    for i in range(rows):
        for j in range(0, BLOCK, 8):
            store(sum32, i, j, value=splat("int32", 0, 8), lanes=8)
    with T.serial(T.ceildiv(groups, GROUPS_PER_DRAIN)) as d:
        clear(sum16, 2 * QUARTERS * rows, "uint16", 8)
        with T.serial(T.min(GROUPS_PER_DRAIN, groups - d * GROUPS_PER_DRAIN)) as g:
            sums = group_sums(w, table, b, r, d * GROUPS_PER_DRAIN + g, rows)
            for (i, j), bytes_ in sums.items():
                for h, half in enumerate(neon.halves(bytes_, "uint8x8")):
                    at = 2 * (QUARTERS * i + j) + h
                    add(sum16, at, 0, value=T.cast(half, "uint16x8"), lanes=8)
        for i in range(rows):
            for j in range(2 * QUARTERS):
                words = T.cast(load(sum16, 2 * QUARTERS * i + j, 0, lanes=8), "int32x8")
                add(sum32, i, 8 * j, value=words, lanes=8)


def tile(output, w, table, m0, b, r, rows):
    """Outputs of block b and `rows` rows from m0 + r on"""
    bias = BIAS * int(w.shape[1])
    sum32 = T.alloc_buffer((rows, BLOCK), "int32", scope="local")
    accumulate(sum32, w, table, b, r, rows)
    with T.serial(rows) as i:

        def sums(j, lanes):
            return load(sum32, i, j, lanes=lanes) - bias

        output.store(m0 + r + i, b, BLOCK, sums)


def kernel(
    n: int, k: int, target: CpuTarget, epilogue: str, *, wide: int = 2, l2_eighths: int = 4
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
                live = T.alloc_buffer((1,), "int32", scope="local")
                first = threads.share(blocks, task, tasks)
                last = threads.share(blocks, task + 1, tasks)
                for m0 in T.serial(T.ceildiv(rows, tile_m)):
                    m = T.meta_var(T.cast(m0 * tile_m, "int32"))
                    height = T.min(T.cast(rows, "int32") - m, tile_m)
                    for r in T.serial(height):
                        fill_table(table, r, q, m + r, k)
                    for b in T.serial(first, last):
                        for r in T.serial(height // wide):
                            tile(output, w, table, m, b, wide * r, wide)
                        for r0 in T.serial(height % wide):
                            r = T.meta_var(height // wide * wide + r0)
                            output.mark_live(live, 0, m + r, b, BLOCK)
                            if live[0] != 0:
                                tile(output, w, table, m, b, r, 1)
                            else:
                                output.store_zeros(m + r, b, BLOCK)

    return end.finish(ternary_matmul)
