"""grouped_matmul on x86: rows of the table stream past activations; a group's scale is a factor of
the last product, so that grouping costs nothing.

Codes are unsigned bytes c' = c + 2**(bits - 1), of which `vpmaddubsw` makes pairs' sums with q, at
most 2 * 63 * 128: 16 bits hold them. `vpmaddwd`, which an INT8 product needs too and multiplies by
1, multiplies by the group's scale here. What the codes are too large by adds 2**(bits - 1) times
the sum of q to a group: taken off once a row, where the scales are read.

    excess[M, K/64] = 2**(bits - 1) * sum of the group's q     once
    for thread in threads:                              parallel, a share of the table's rows each
        M = 1:  for n in share/STREAMS:                 streams far apart, each one long run
                    steps[STREAMS, K/64]                group scales as pairs of int16, L1
                    sums[s] = -excess * steps[s]
                    for block of 256 columns:           one register of sums a stream
                        for group in 4:
                            sums[s] += (codes(w[n + s share/STREAMS]) * q) * steps[s, group]
        M > 1:  for n in share, by PAIR:
                    for m in M, by ROWS:                PAIR * ROWS registers of sums
    out[m, n] = sum of lanes

    tile     | AVX2, VNNI | bound by
    STREAMS  | 4, 8       | the memory's prefetchers, which follow one run a page: knob
    PREFETCH | 2048       | bytes ahead in a stream, over the end of a page, where they stop: knob
    PAIR     | 2          | codes of a row are unpacked once for ROWS of q
    ROWS     | 2, 4       | PAIR * ROWS sums, codes of a block: 16 registers, 32

Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, 128256 x 2560 at 6 bits, cold, two
threads, share of a plain read of the same bytes (23 GB/s): AVX-512 VNNI 0.98, AVX2 0.87; at 4 bits,
AVX-512 VNNI 0.93.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules import grouped
from schedules.epilogue import EPILOGUES, Output
from schedules.grouped import BLOCK, GROUP, LINE
from schedules.intrin import avx2, threads

PAIR = 2


@dataclass(frozen=True)
class Vectors:
    """What an instruction set does with a register."""

    bytes: int  # of a register
    rows: int  # ROWS above
    multiply_add_bytes: Callable[[Expr, Expr], Expr]
    add_products: Callable[[Expr, Expr, Expr], Expr]  # sums, int16, int16 -> sums

    @property
    def lanes(self) -> int:
        return self.bytes // 4

    @property
    def parts(self) -> range:
        """First bytes of the registers of a line."""
        return range(0, LINE, self.bytes)

    def splat(self, value: int) -> Expr:
        return T.broadcast(T.uint8(value), self.bytes)


def padded_groups(k: int, x86: Vectors) -> int:
    """Groups, rounded up to whole registers of steps."""
    return -(-k // GROUP // x86.lanes) * x86.lanes


def codes(w, n, at, bits: int, groups: int, x86: Vectors) -> list[Expr]:
    """c' of a register's columns of each group, of the lines of a block from byte `at` on"""
    lines = [
        T.Bind(avx2.load(w, n, at + LINE * line, lanes=x86.bytes)) for line in range(bits // 2)
    ]
    found = []
    for f in range(groups):
        code = avx2.shift_bytes(lines[f // 2], -4 * (f % 2)) & x86.splat(15)
        if bits == 6:
            code = code | (avx2.shift_bytes(lines[2], 4 - 2 * f) & x86.splat(0x30))
        found.append(T.Bind(code))
    return found


def write_excess(excess, q, m, k: int, bits: int, x86: Vectors):
    """excess[m, group] = what the codes' offset adds to the group's sum; 0 behind the last"""
    with T.serial(padded_groups(k, x86) - k // GROUP) as i:
        T.buffer_store(excess, T.int32(0), [m, k // GROUP + i])
    with T.serial(k // GROUP) as group:
        total = avx2.splat("int32", 0, x86.lanes)
        for part in x86.parts:
            activations = avx2.load(q, m, GROUP * group + part, lanes=x86.bytes)
            pairs = x86.multiply_add_bytes(x86.splat(grouped.offset(bits)), activations)
            total = x86.add_products(total, pairs, avx2.splat("int16", 1, 2 * x86.lanes))
        T.buffer_store(excess, avx2.sum_lanes(total), [m, group])


def begin_row(sums, steps, i, w, n, excess, rows, k: int, prefetch: int, x86: Vectors):
    """steps[i, group] = the group's scale in both halves; sums = what is too much, negative"""
    for total in sums:
        avx2.store(total, 0, value=avx2.splat("int32", 0, x86.lanes), lanes=x86.lanes)
    for ahead in avx2.ask_at(prefetch, LINE):
        avx2.prefetch(w, n, ahead)
    with T.serial(padded_groups(k, x86) // x86.lanes) as v:
        at = x86.lanes * v
        found = T.Bind(T.cast(avx2.load(w, n, at, lanes=x86.lanes), f"int32x{x86.lanes}"))
        twice = found * avx2.splat("int32", 0x10001, x86.lanes)
        avx2.store(steps, i, at, value=twice, lanes=x86.lanes)
        for total, m in zip(sums, rows, strict=True):
            surplus = avx2.load(excess, m, at, lanes=x86.lanes) * found
            avx2.add(total, 0, value=-surplus, lanes=x86.lanes)


def add_block(sums, steps, i, w, n, q, rows, block, groups: int, bits, prefetch, x86: Vectors):
    """sums[j] += products of `groups` groups of a block of row n with row j of q"""
    at = grouped.blocks_at(int(q.shape[1])) + grouped.block_bytes(bits) * block
    for line, ahead in product(range(bits // 2), avx2.ask_at(prefetch, LINE)):
        avx2.prefetch(w, n, at + LINE * line + ahead)
    for part in x86.parts:
        found = codes(w, n, at + part, bits, groups, x86)
        for total, m in zip(sums, rows, strict=True):
            value = avx2.load(total, 0, lanes=x86.lanes)
            for f, code in enumerate(found):
                column = BLOCK * block + GROUP * f + part
                pairs = x86.multiply_add_bytes(code, avx2.load(q, m, column, lanes=x86.bytes))
                step = T.broadcast(steps[i, BLOCK // GROUP * block + f], x86.lanes)
                step = T.reinterpret(f"int16x{2 * x86.lanes}", step)
                value = x86.add_products(value, pairs, step)
            avx2.store(total, 0, value=value, lanes=x86.lanes)


def tile(output, w, q, excess, table_rows, rows, k: int, bits: int, prefetch: int, x86: Vectors):
    """out of these rows of the table and of q"""
    # Registers: a buffer each, and not of scope "local", which TVM takes from the heap
    sums = [[T.alloc_buffer((x86.lanes,), "int32") for _ in rows] for _ in table_rows]
    steps = T.alloc_buffer((len(table_rows), padded_groups(k, x86)), "int32")
    # as int64, so that a row has one address and not one for each of its lines
    at = [T.Bind(T.cast(n, "int64")) for n in table_rows]
    for i, n in enumerate(at):
        begin_row(sums[i], steps, i, w, n, excess, rows, k, prefetch, x86)

    def add(block, groups: int):
        for i, n in enumerate(at):
            add_block(sums[i], steps, i, w, n, q, rows, block, groups, bits, prefetch, x86)

    with T.serial(k // BLOCK) as block:
        add(block, BLOCK // GROUP)
    if k % BLOCK:
        add(k // BLOCK, k % BLOCK // GROUP)
    for i, n in enumerate(table_rows):
        for total, m in zip(sums[i], rows, strict=True):
            output.store_one(m, n, avx2.sum_lanes(avx2.load(total, 0, lanes=x86.lanes)))


def kernel(n: int, k: int, bits: int, streams: int, prefetch: int, x86: Vectors) -> PrimFunc:
    end = EPILOGUES["scale"]
    rows = Var("M", "int64")

    def one_row(first, last, tile_of):
        run = T.Bind((last - first) // streams)
        with T.serial(run) as j:
            tile_of([first + s * run + j for s in range(streams)], [0], prefetch)
        with T.serial((last - first) % streams) as j:
            tile_of([last - 1 - j], [0], prefetch)

    def many_rows(table_rows, tile_of):
        with T.serial(rows // x86.rows) as r:
            tile_of(table_rows, [x86.rows * r + i for i in range(x86.rows)], 0)
        with T.serial(rows % x86.rows) as r:
            tile_of(table_rows, [rows - 1 - r], 0)

    @T.prim_func(s_tir=True)
    def grouped_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((n, grouped.row_bytes(k, bits)), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, None, out))
        with T.sblock("root"):
            excess = T.alloc_buffer((rows, padded_groups(k, x86)), "int32")
            tile_of = T.meta_var(
                lambda table_rows, at, ahead: tile(
                    output, w, q, excess, table_rows, at, k, bits, ahead, x86
                )
            )
            for m in T.serial(rows):
                write_excess(excess, q, m, k, bits, x86)
            tasks = T.min(threads.count(), n)
            for task in T.parallel(tasks):
                first = threads.share(n, task, tasks)
                last = threads.share(n, task + 1, tasks)
                if rows == 1:
                    one_row(first, last, tile_of)
                else:
                    for j in T.serial((last - first) // PAIR):
                        at = T.meta_var([first + PAIR * j + i for i in range(PAIR)])
                        many_rows(at, tile_of)
                    if (last - first) % PAIR != 0:
                        at = T.meta_var([last - 1])
                        many_rows(at, tile_of)

    return grouped_matmul
