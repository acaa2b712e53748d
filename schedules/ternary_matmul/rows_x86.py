"""Gated ternary_matmul on x86: only rows of weights whose gate is positive are read.

A row of weights is one run of memory in the layout `rows_256`, and a row of activations has a list
of those that it needs. Codes {0, 1, 2} are multiplied as unsigned bytes; sum(q) is taken off.

    for thread in threads:                              parallel, a share of the blocks each
        qs[TILE_M, K] = rows of q                       zeros behind K
        for strip of STRIP rows of w in the share:      M = 1: all of them at once
            for m in M:
                live = rows of the strip by gate[m]     out[m] = 0 elsewhere
                for row in live / STREAMS:              streams far apart
                    for c in K/256:                     64 bytes of each row: sums in registers
                        sums[s] += codes(w[row, c]) * qs[m, 256c :]
                    out[m, row] = sum of lanes

    tile     | value       | bound by
    STREAMS  | 4           | registers of sums, the memory's prefetchers: knob
    PREFETCH | 2048        | bytes of live rows ahead in a stream: knob
    STRIP    | of l2_bytes | rows of w in half of L2, where every row of q meets them
    TILE_M   | of l2_bytes | rows of q in half of L2
    task     | 1 block     | the least that is worth waking a thread for: knob

Measured: Sapphire Rapids class Xeon, 2 cores, busy, 2026-11-22, cold, one thread, 6912 x 2560, 4
bits; time over that of every row in the ungated kernel's layout, at 0, 50, 67, 84 % of gates <= 0.
One token, VNNI 0.95, 0.79, 0.60, 0.38 (211 us at 67 %), AVX2 1.2, 0.8, 0.58, 0.37 (243 us). 32
tokens, VNNI 2.4, 1.2, 0.85, 0.53; AVX2 2.7, 1.4, 0.93, 0.59: models have 62 % and more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, threads
from schedules.layouts import LAYOUTS
from schedules.targets import CpuTarget

LAYOUT = "rows_256"
LINE = 64  # bytes
BLOCK = 64  # rows of weights of which the layout has a whole number
FIELDS = 4
CHUNK = FIELDS * LINE  # columns of a line


@dataclass(frozen=True)
class Vectors:
    """What an instruction set does."""

    # (w, qs, r, rows of w, for each those to prefetch meanwhile) -> int32 sums of codes * qs[r]
    sums: Callable[..., list[Expr]]
    sum_row: Callable[..., None]  # (totals, to, qs, r): totals[to] = sum of qs[r]
    gates: int = 1  # listed at once
    compress: Callable[[Expr, Expr], Expr] | None = None  # (values, mask), if several are


@dataclass(frozen=True)
class Walk:
    """How rows of weights are walked."""

    x86: Vectors
    streams: int
    prefetch: int  # bytes ahead
    strip_bytes: int  # of w that every row of q meets in L2

    def rows_ahead(self, w) -> int:
        return -(-self.prefetch // row_bytes(w))

    def strip_rows(self, w) -> int:
        return max(BLOCK, self.strip_bytes // row_bytes(w))


def row_bytes(w) -> int:
    return LINE * int(w.shape[1])


def copy_row(qs, r, q, m, k: int):
    """qs[r] = row m of q, zeros behind K"""
    with T.serial(k // LINE) as v:
        avx2.store(qs, r, LINE * v, value=avx2.load(q, m, LINE * v, lanes=LINE), lanes=LINE)
    rest = k // LINE * LINE
    for column in range(rest, int(qs.shape[1]), LINE):
        avx2.store(qs, r, column, value=avx2.splat("int8", 0, LINE), lanes=LINE)
    if k % LINE:
        with T.serial(k % LINE) as i:
            T.buffer_store(qs, q[m, rest + i], [r, rest + i])


def append(live, count, output: Output, m, n, lanes: int, compress):
    """The live ones of rows n to n + lanes behind the `count` that are listed; zeros in out[m]"""
    rows = T.ramp(n, 1, lanes) if lanes > 1 else n
    is_live = avx2.load(output.extra, m, n, lanes=lanes) > avx2.splat("float32", 0, lanes)
    ones = T.cast(is_live, avx2.like("int32", lanes))
    if lanes > 1:
        rows, ones = compress(rows, is_live), avx2.sum_lanes(ones)
    avx2.store(live, count[0], value=rows, lanes=lanes)
    avx2.store(output.out, m, n, value=avx2.splat("float32", 0, lanes), lanes=lanes)
    T.buffer_store(count, count[0] + ones, [0])


def list_live(live, output: Output, m, first, last, room: int, x86: Vectors) -> Expr:
    """live[:count] = the rows in [first, last) that out[m] needs, behind them `room` to prefetch;
    count. The other outputs are set to zero."""
    count = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(count, T.int32(0), [0])
    vectors = T.Bind((last - first) // x86.gates)
    with T.serial(vectors) as i:
        append(live, count, output, m, first + x86.gates * i, x86.gates, x86.compress)
    if x86.gates > 1:
        with T.serial((last - first) % x86.gates) as i:
            append(live, count, output, m, first + x86.gates * vectors + i, 1, None)
    with T.serial(room) as i:
        T.buffer_store(live, last + i, [count[0] + i])
    return T.Bind(count[0])


def strip_row(output, w, qs, r, total, live, m, first, last, walk: Walk):
    """out[m, first:last], row r of qs being row m of q"""
    aheads = avx2.ask_at(walk.rows_ahead(w))

    def finish(rows, later):
        for row, acc in zip(rows, walk.x86.sums(w, qs, r, rows, later), strict=True):
            output.store_one(m, row, acc - total)

    def row_of(i):
        return T.Bind(T.cast(live[i], "int64"))

    count = list_live(live, output, m, first, last, max(aheads, default=0), walk.x86)
    run = T.Bind(count // walk.streams)
    with T.serial(run) as j:
        at = [j + s * run for s in range(walk.streams)]
        finish([row_of(i) for i in at], [[row_of(i + far) for far in aheads] for i in at])
    if walk.streams > 1:
        with T.serial(count % walk.streams) as j:
            finish([row_of(walk.streams * run + j)], [[]])


def any_rows(output, w, qs, totals, m, height, first, share, walk: Walk):
    """out[m : m + height] for `share` blocks from `first` on, from the rows in qs"""
    live = T.alloc_buffer((output.n + max(walk.rows_ahead(w), walk.x86.gates),), "int32")
    begin = T.Bind(BLOCK * first)
    end = T.Bind(T.min(BLOCK * (first + share), output.n))
    strip = T.Bind(T.if_then_else(height == 1, T.max(end - begin, 1), walk.strip_rows(w)))
    with T.serial(T.ceildiv(end - begin, strip)) as i, T.serial(height) as r:
        n0 = T.Bind(begin + i * strip)
        n1 = T.Bind(T.min(n0 + strip, end))
        strip_row(output, w, qs, r, totals[r], live, m + r, n0, n1, walk)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    epilogue: str,
    x86: Vectors,
    *,
    streams: int,
    prefetch: int,
    blocks_a_task: int = 1,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    num_weights, chunks, _ = LAYOUTS[LAYOUT].packed_shape(n, k)
    blocks, columns = num_weights // BLOCK, CHUNK * chunks
    tile_m = max(1, target.l2_bytes // 2 // columns)
    walk = Walk(x86, streams, prefetch, target.l2_bytes // 2)
    num_rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((num_rows, k), "int8"),
        scale: T.Buffer((num_rows,), "float32"),
        w: T.Buffer((num_weights, chunks, LINE), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((num_rows, n), "float32"),
        out: T.Buffer((num_rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        with T.sblock("root"):
            tasks = T.min(threads.count(), -(-blocks // blocks_a_task))
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                qs = T.alloc_buffer((tile_m, columns), "int8")
                totals = T.alloc_buffer((tile_m,), "int32")
                for tile_index in T.serial(T.ceildiv(T.cast(num_rows, "int32"), tile_m)):
                    m = T.meta_var(tile_index * tile_m)
                    height = T.min(T.cast(num_rows, "int32") - m, tile_m)
                    for r in T.serial(height):
                        copy_row(qs, r, q, m + r, k)
                        x86.sum_row(totals, r, qs, r)
                    any_rows(output, w, qs, totals, m, height, first, share, walk)

    return end.finish(ternary_matmul)
