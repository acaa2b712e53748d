"""grouped_matmul on x86: rows of the table stream past activations; a group's scale is a factor of
the last product, so that grouping costs nothing.

Codes are unsigned bytes c' = c + 2**(bits - 1), of which `vpmaddubsw` makes pairs' sums with q, at
most 2 * 63 * 128: 16 bits hold them. The excess of the pair, 2**(bits - 1) (q[2i] + q[2i+1]), is
taken off. `vpmaddwd`, which an INT8 product needs too and multiplies by 1, multiplies by the
group's scale here.

    excess[M, K/2] = 2**(bits - 1) * sums of pairs of q         int16, once
    for thread in threads:                              parallel, a share of the table's rows each
        M = 1:  for n in share/STREAMS:                 streams far apart, each one long run
                    steps[STREAMS, K/64]                group scales as pairs of int16, L1
                    for group in K/64:                  one register of sums a stream
                        sums[s] += (codes(w[n + s share/STREAMS, group]) * q[group]) * steps[s]
        M > 1:  for n in share, by PAIR:
                    for m in M, by ROWS:                PAIR * ROWS registers of sums
    out[m, n] = sum of lanes

    tile     | AVX2, VNNI | bound by
    STREAMS  | 4, 8       | the memory's prefetchers, which follow one run a page: knob
    PREFETCH | 2048       | bytes ahead in a stream, over the end of a page, where they stop: knob
    PAIR     | 2          | codes of a row are unpacked once for ROWS of q
    ROWS     | 2, 4       | PAIR * ROWS sums, ROWS of q and of its excess: 16 registers, 32
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules import grouped
from schedules.epilogue import EPILOGUES, Output
from schedules.grouped import GROUP
from schedules.intrin import avx2, threads

PAIR = 2


@dataclass(frozen=True)
class Vectors:
    """What an instruction set does with a register."""

    bytes: int  # of a register
    rows: int  # ROWS above
    codes: Callable[..., list[Expr]]  # (w, n, k, bits, group) -> c', whole registers
    multiply_add_bytes: Callable[[Expr, Expr], Expr]
    add_products: Callable[[Expr, Expr, Expr], Expr]  # sums, int16, int16 -> sums

    @property
    def lanes(self) -> int:
        return self.bytes // 4

    @property
    def columns(self) -> range:
        """First columns of the registers of a group."""
        return range(0, GROUP, self.bytes)


def padded_groups(k: int, x86: Vectors) -> int:
    """Groups, rounded up to whole registers of steps."""
    return -(-k // GROUP // x86.lanes) * x86.lanes


def write_excess(excess, q, m, k: int, bits: int, x86: Vectors):
    """excess[m] = what the codes' offset adds to each pair of products"""
    with T.serial(k // x86.bytes) as v:
        offsets = T.broadcast(T.uint8(grouped.offset(bits)), x86.bytes)
        activations = avx2.load(q, m, x86.bytes * v, lanes=x86.bytes)
        value = x86.multiply_add_bytes(offsets, activations)
        avx2.store(excess, m, x86.bytes // 2 * v, value=value, lanes=x86.bytes // 2)


def write_steps(steps, i, w, n, k: int, bits: int, x86: Vectors):
    """steps[i, group] = the group's scale in both halves; what follows the scales is read too"""
    with T.serial(padded_groups(k, x86) // x86.lanes) as v:
        at = grouped.scales_at(k, bits) + x86.lanes * v
        found = T.cast(avx2.load(w, n, at, lanes=x86.lanes), f"int32x{x86.lanes}")
        twice = found * T.broadcast(T.int32(0x10001), x86.lanes)
        avx2.store(steps, i, x86.lanes * v, value=twice, lanes=x86.lanes)


def lane_sums(lanes, steps, w, q, excess, table_rows, rows, k, bits, prefetch: int, x86: Vectors):
    """lanes[i * len(rows) + j] = sums of row i of the table times row j of q"""
    avx2.clear(lanes, len(table_rows) * len(rows), "int32", x86.lanes)
    share = -(-int(w.shape[1]) * GROUP // k)  # of a row, to prefetch with each group
    with T.serial(k // GROUP) as group:

        def of_rows(buffer, wide: int):
            """The group's columns, `wide` of them an element, of every row"""
            lanes = x86.bytes // wide
            at = [(GROUP * group + column) // wide for column in x86.columns]
            return [[T.Bind(avx2.load(buffer, m, c, lanes=lanes)) for c in at] for m in rows]

        signed, over = of_rows(q, 1), of_rows(excess, 2)
        for i, n in enumerate(table_rows):
            codes = [T.Bind(register) for register in x86.codes(w, n, k, bits, group)]
            if prefetch:
                avx2.prefetch(w, n, share * group + prefetch)
            step = T.broadcast(steps[i, group], x86.lanes)
            step = T.Bind(T.reinterpret(f"int16x{2 * x86.lanes}", step))
            for j in range(len(rows)):
                at = i * len(rows) + j
                total = avx2.load(lanes, at, 0, lanes=x86.lanes)
                for code, activations, offset in zip(codes, signed[j], over[j], strict=True):
                    pairs = x86.multiply_add_bytes(code, activations) - offset
                    total = x86.add_products(total, pairs, step)
                avx2.store(lanes, at, 0, value=total, lanes=x86.lanes)


def tile(output, w, q, excess, table_rows, rows, k: int, bits: int, prefetch: int, x86: Vectors):
    """out of these rows of the table and of q"""
    lanes = T.alloc_buffer((len(table_rows) * len(rows), x86.lanes), "int32", scope="local")
    steps = T.alloc_buffer((len(table_rows), padded_groups(k, x86)), "int32")
    for i, n in enumerate(table_rows):
        write_steps(steps, i, w, n, k, bits, x86)
    lane_sums(lanes, steps, w, q, excess, table_rows, rows, k, bits, prefetch, x86)
    for at, (n, m) in enumerate((n, m) for n in table_rows for m in rows):
        output.store_one(m, n, avx2.sum_lanes(avx2.load(lanes, at, 0, lanes=x86.lanes)))


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
            excess = T.alloc_buffer((rows, k // 2), "int16")
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
