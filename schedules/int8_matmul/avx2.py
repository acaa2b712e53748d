"""int8_matmul on AVX2: rows of the table stream past activations that stay, as 16-bit products.

    for thread in threads:                              parallel, a share of the table's rows each
        for m0 in M/TILE_M:
            q16[TILE_M, K]                              int16: L2, each thread its own
            for n in share, by S:
                for m in tile, by R:
                    for k in K/16:                      S * R registers of sums
                        sums += multiply_add(widen(w[n, k : k + 16]), q16[m, k : k + 16])
                    out[m, n] = sum of lanes, and of the K % 16 columns left

    tile (S, R) | value        | bound by
    M = 1       | streams, 1   | four streams of cold table, each one long run, prefetched over
                |              | the ends of pages, where the hardware's prefetchers stop
    M > 1       | pair, wide   | 16 registers: 2 * 4 sums, 2 weights, activations from memory
    TILE_M      | of l2_bytes  | activations of a tile of rows in `l2_eighths` / 8 of L2

A product is at most 2**14, so a lane of int32 holds K to 2**18 and a sum K to 2**17.
Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, table 64128 x 2560, cold, best of 8
interleaved runs, GB/s of the table with one thread and with two: 11.5, 22.4; without prefetch
10.3, 19.9; four neighbouring rows instead of runs, not prefetched, 7.0, 14.1.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, threads
from schedules.targets import CpuTarget

LANES = 16  # int16 in a register
KNOBS = {
    "streams": (4, 1, 2, 8),  # rows of the table at once, one row of activations
    "prefetch": (2048, 0, 4096),  # bytes ahead in a stream
    "pair": (2, 1, 4),  # rows of the table at once, `wide` rows of activations
    "wide": (4, 2, 1),
    "l2_eighths": (4, 2, 8, 32),  # of the target's L2, for a tile of activations
}


def widen_rows(q16, q, m, rows, height, k):
    """q16[:height] = rows of q from m on, zeros past `rows`"""
    with T.serial(height) as r:
        with T.If(r < rows):
            with T.Then(), T.serial(k) as i:
                T.buffer_store(q16, T.cast(q[m + r, i], "int16"), [r, i])
            with T.Else(), T.serial(k) as i:
                T.buffer_store(q16, T.int16(0), [r, i])


def lane_sums(lanes, w, q16, n, step, r, k, streams, rows, prefetch):
    """lanes[stream * rows + row, 8] = sums over the whole vectors of K"""
    sums = avx2.registers(streams * rows, "int32", 8)
    with T.serial(k // LANES) as v:
        for s in range(streams):
            weights = avx2.load(w, n + step * s, LANES * v, lanes=LANES)
            if prefetch:
                avx2.prefetch(w, n + step * s, LANES * v + prefetch)
            weights = T.Bind(T.cast(weights, "int16x16"))
            for t in range(rows):
                activations = avx2.load(q16, r + t, LANES * v, lanes=LANES)
                product = avx2.multiply_add_words(weights, activations)
                avx2.add(sums[s * rows + t], 0, value=product, lanes=8)
    for at, total in enumerate(sums):
        avx2.store(lanes, at, 0, value=avx2.load(total, 0, lanes=8), lanes=8)


def tile(output, w, q16, n, step, m0, r, height, k, streams, rows, prefetch=0):
    """out of `streams` rows of the table and `rows` rows from m0 + r on, of which `height` exist"""
    lanes = T.alloc_buffer((streams * rows, 8), "int32", scope="local")
    rest = T.alloc_buffer((1,), "int32", scope="local")
    lane_sums(lanes, w, q16, n, step, r, k, streams, rows, prefetch)
    with T.serial(streams) as s, T.serial(T.min(rows, height - r)) as t:
        T.buffer_store(rest, T.int32(0), [0])
        with T.serial(k % LANES) as i:
            at = k // LANES * LANES + i
            product = T.cast(w[n + step * s, at], "int32") * T.cast(q16[r + t, at], "int32")
            T.buffer_store(rest, rest[0] + product, [0])
        total = avx2.sum_lanes(avx2.load(lanes, s * rows + t, 0, lanes=8)) + rest[0]
        output.store_one(m0 + r + t, n + step * s, total)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    *,
    streams: int = 4,
    prefetch: int = 2048,
    pair: int = 2,
    wide: int = 4,
    l2_eighths: int = 4,
) -> PrimFunc:
    end = EPILOGUES["scale"]
    tile_m = max(wide, target.l2_bytes * l2_eighths // 8 // (2 * k) // wide * wide)
    rows = Var("M", "int64")

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
                q16 = T.alloc_buffer((tile_m, k), "int16")
                first = threads.share(n, task, tasks)
                last = threads.share(n, task + 1, tasks)
                for tile_index in T.serial(T.ceildiv(T.cast(rows, "int32"), tile_m)):
                    m0 = T.meta_var(tile_index * tile_m)
                    height = T.min(T.cast(rows, "int32") - m0, tile_m)
                    if height == 1:
                        widen_rows(q16, q, m0, 1, 1, k)
                        run = (last - first) // streams
                        for j in T.serial(run):
                            at = T.meta_var(first + j)
                            tile(output, w, q16, at, run, m0, 0, 1, k, streams, 1, prefetch)
                        for j in T.serial((last - first) % streams):
                            tile(output, w, q16, last - 1 - j, 0, m0, 0, 1, k, 1, 1)
                    else:
                        groups = T.meta_var(T.ceildiv(height, wide))
                        widen_rows(q16, q, m0, height, groups * wide, k)
                        for j in T.serial((last - first) // pair):
                            row = T.meta_var(first + pair * j)
                            for r in T.serial(groups):
                                tile(output, w, q16, row, 1, m0, wide * r, height, k, pair, wide)
                        for j in T.serial((last - first) % pair):
                            for r in T.serial(groups):
                                row = T.meta_var(last - 1 - j)
                                tile(output, w, q16, row, 0, m0, wide * r, height, k, 1, wide)

    return int8_matmul
