"""int8_matmul on NEON: rows of the table stream past activations that stay.

    for thread in threads:                              parallel, a share of the table's rows each
        for m0 in M/TILE_M:
            qs[TILE_M, K]                               zeros past M; L2, each thread its own
            for n in share, by STREAMS:
                for m in tile, by ROWS:
                    for k in K/16:                      S * R registers of sums
                        sums += w[n, k : k + 16] . qs[m, k : k + 16]
                    out[m, n] = sum of lanes, and of the K % 16 columns left

    tile (S, R) | value         | bound by
    M = 1       | (streams, 1)  | sums that hide the latency of a product; streams of cold table
    M > 1       | (4, 4)        | 32 registers: 16 sums, 4 weights, 4 activations
    TILE_M      | of l2_bytes   | activations of a tile of rows in half of L2

A product is at most 2**14, so a sum of int32 holds K to 2**17. Counted: docs/log.md.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import neon, threads
from schedules.intrin.lanes import clear, load, store
from schedules.targets import CpuTarget

LANES = 16
WIDE = 4  # rows of the table, and of activations, of the tile for M > 1
KNOBS = {"streams": (4, 8, 2)}


def long_product(sums: Expr, a: Expr, b: Expr) -> Expr:
    """smull and sadalp, of either half: two products of -128 by -128 do not fit 16 bits."""
    for x, y in zip(neon.halves(a, "int8x8"), neon.halves(b, "int8x8"), strict=True):
        sums = sums + neon.add_pairs_long(neon.multiply_long(x, y))
    return sums


def copy_rows(qs, q, m, rows, height, k):
    """qs[:height] = rows of q from m on, zeros past `rows`"""
    with T.serial(height) as r:
        with T.If(r < rows):
            with T.Then(), T.serial(k) as i:
                T.buffer_store(qs, q[m + r, i], [r, i])
            with T.Else(), T.serial(k) as i:
                T.buffer_store(qs, T.int8(0), [r, i])


def lane_sums(lanes, w, qs, n, r, k, streams: int, rows: int, product: neon.Dot):
    """lanes[stream * rows + row, 4] = sums over the whole vectors of K"""
    clear(lanes, streams * rows, "int32", 4)
    with T.serial(k // LANES) as v:
        activations = [T.Bind(load(qs, r + t, LANES * v, lanes=LANES)) for t in range(rows)]
        for s in range(streams):
            weights = T.Bind(load(w, n + s, LANES * v, lanes=LANES))
            for t in range(rows):
                at = s * rows + t
                value = product(load(lanes, at, 0, lanes=4), weights, activations[t])
                store(lanes, at, 0, value=value, lanes=4)


def tile(output, w, qs, n, m0, r, height, k, streams: int, rows: int, product: neon.Dot):
    """out of `streams` rows of the table and `rows` rows from m0 + r on, of which `height` exist"""
    lanes = T.alloc_buffer((streams * rows, 4), "int32", scope="local")
    rest = T.alloc_buffer((1,), "int32", scope="local")
    lane_sums(lanes, w, qs, n, r, k, streams, rows, product)
    for s in range(streams):
        for t in range(rows):
            with T.If(r + t < height), T.Then():
                T.buffer_store(rest, T.int32(0), [0])
                with T.serial(k % LANES) as i:
                    at = k // LANES * LANES + i
                    found = T.cast(w[n + s, at], "int32") * T.cast(qs[r + t, at], "int32")
                    T.buffer_store(rest, rest[0] + found, [0])
                total = neon.sum_lanes(load(lanes, s * rows + t, 0, lanes=4)) + rest[0]
                output.store_one(m0 + r + t, n + s, total)


def rows_of_table(first, last, streams: int, body: Callable) -> None:
    """body(n, streams) for whole tiles of the share, body(n, 1) for what is left"""
    with T.serial((last - first) // streams) as j:
        body(first + streams * j, streams)
    with T.serial((last - first) % streams) as j:
        body(last - 1 - j, 1)


def kernel(n: int, k: int, target: CpuTarget, product: neon.Dot, *, streams: int = 4) -> PrimFunc:
    end = EPILOGUES["scale"]
    tile_m = max(WIDE, target.l2_bytes // 2 // k // WIDE * WIDE)
    rows = Var("M", "int64")

    def one_row(output, w, qs, first, last, m):
        rows_of_table(
            first, last, streams,
            lambda j, some: tile(output, w, qs, j, m, 0, 1, k, some, 1, product),
        )  # fmt: skip

    def many_rows(output, w, qs, first, last, m, height):
        def body(j, some):
            with T.serial(T.ceildiv(height, WIDE)) as r:
                tile(output, w, qs, j, m, WIDE * r, height, k, some, WIDE, product)

        rows_of_table(first, last, WIDE, body)

    @T.prim_func(s_tir=True)
    def int8_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((n, k), "int8"),
        w_scale: T.Buffer((n,), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, None, out))
        with T.sblock("root"):
            tasks = T.min(threads.count(), n)
            for task in T.parallel(tasks):
                qs = T.alloc_buffer((tile_m, k), "int8")
                first = threads.share(n, task, tasks)
                last = threads.share(n, task + 1, tasks)
                for tile_index in T.serial(T.ceildiv(T.cast(rows, "int32"), tile_m)):
                    m = T.meta_var(tile_index * tile_m)
                    height = T.min(T.cast(rows, "int32") - m, tile_m)
                    if height == 1:
                        copy_rows(qs, q, m, 1, 1, k)
                        one_row(output, w, qs, first, last, m)
                    else:
                        copy_rows(qs, q, m, height, T.ceildiv(height, WIDE) * WIDE, k)
                        many_rows(output, w, qs, first, last, m, height)

    return int8_matmul
