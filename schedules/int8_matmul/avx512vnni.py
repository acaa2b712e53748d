"""int8_matmul on AVX-512 VNNI: rows of the table stream past activations, four bytes a lane.

`vpdpbusd` multiplies unsigned by signed bytes: the table's sign bits are flipped, which adds 128,
and 128 sum(q) is taken off.

    for thread in threads:                              parallel, a share of the table's rows each
        M = 1:  for n in share/STREAMS:                 streams far apart, each one long run
                    for k in K/64:                      one register of sums a stream
                        sums[s] += dot(w[n + s share/STREAMS, k : k + 64] + 128, q[k : k + 64])
        M > 1:  for n in share, by PAIR:
                    for m in M, by ROWS:                PAIR * ROWS registers of sums
    out[m, n] = sum of lanes - 128 sum(q), and of the K % 64 columns left

    tile     | value     | bound by
    STREAMS  | 8         | the memory's prefetchers, which follow one run a page: knob
    PREFETCH | 2048      | bytes ahead in a stream, over the end of a page, where they stop: knob
    PAIR     | 2, ROWS 4 | 8 sums, 2 of the table; activations come from L1

Sums wrap at 32 bits and end within 2**14 K, so K may reach 2**17.
Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, table 64128 x 2560, cold; GB/s of the
table with one thread and with two, best of 12 interleaved runs. AVX2, four neighbouring rows: 7.0,
14.1. Here 1 stream: 18.7 with two; 4 streams without prefetch 24.2, with 4096 bytes 12.2, 28.0;
8 streams and 2048 bytes 13.3, 28.8; 16 streams 13.2, 30.5.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, avx512, threads
from schedules.targets import CpuTarget

LANES = avx512.LINE
PAIR = 2  # rows of the table at once, several rows of activations
ROWS = 4
KNOBS = {"streams": (8, 4, 2, 16), "prefetch": (2048, 0, 4096)}


def lane_sums(lanes, w, q, table_rows, activation_rows, k: int, prefetch: int):
    """lanes[i * len(activation_rows) + j] += sums over the whole registers of K"""
    with T.serial(k // LANES) as v:
        column = LANES * v
        activations = [
            T.Bind(avx2.load(q, m, column, lanes=LANES)) if len(table_rows) > 1 else None
            for m in activation_rows
        ]
        for i, n in enumerate(table_rows):
            weights = T.Bind(avx512.biased(avx2.load(w, n, column, lanes=LANES)))
            if prefetch:
                avx2.prefetch(w, n, column + prefetch)
            for j, m in enumerate(activation_rows):
                so_far = lanes[i * len(activation_rows) + j]
                signed = activations[j]
                if signed is None:
                    signed = avx2.load(q, m, column, lanes=LANES)
                total = avx512.dot_bytes(avx2.load(so_far, 0, lanes=16), weights, signed)
                avx2.store(so_far, 0, value=total, lanes=16)


def tile(output, w, q, bias, table_rows, activation_rows, k: int, prefetch: int):
    """out of these rows of the table and of q"""
    pairs = [(n, m) for n in table_rows for m in activation_rows]
    lanes = avx2.registers(len(pairs), "int32", 16)
    rest = T.alloc_buffer((1,), "int32")
    lane_sums(lanes, w, q, table_rows, activation_rows, k, prefetch)
    for total, (n, m) in zip(lanes, pairs, strict=True):
        T.buffer_store(rest, T.int32(0), [0])
        with T.serial(k % LANES) as j:
            at = k // LANES * LANES + j
            product = T.cast(w[n, at], "int32") * T.cast(q[m, at], "int32")
            T.buffer_store(rest, rest[0] + product, [0])
        acc = avx2.sum_lanes(avx2.load(total, 0, lanes=16)) - bias[m] + rest[0]
        output.store_one(m, n, acc)


def write_bias(bias, q, m, k: int):
    """bias[m] = 128 * sum of q[m] over the whole registers of K"""
    (lanes,) = avx2.registers(1, "int32", 16)
    with T.serial(k // LANES) as v:
        codes = avx2.load(q, m, LANES * v, lanes=LANES)
        offset = T.broadcast(T.uint8(128), LANES)
        total = avx512.dot_bytes(avx2.load(lanes, 0, lanes=16), offset, codes)
        avx2.store(lanes, 0, value=total, lanes=16)
    T.buffer_store(bias, avx2.sum_lanes(avx2.load(lanes, 0, lanes=16)), [m])


def kernel(
    n: int, k: int, target: CpuTarget, *, streams: int = 8, prefetch: int = 2048
) -> PrimFunc:
    end = EPILOGUES["scale"]
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
            bias = T.alloc_buffer((rows,), "int32")
            for m in T.serial(rows):
                write_bias(bias, q, m, k)
            tasks = T.min(threads.count(), n)
            for task in T.parallel(tasks):
                first = threads.share(n, task, tasks)
                last = threads.share(n, task + 1, tasks)
                if rows == 1:
                    run = (last - first) // streams
                    for j in T.serial(run):
                        table_rows = T.meta_var([first + s * run + j for s in range(streams)])
                        tile(output, w, q, bias, table_rows, [0], k, prefetch)
                    for j in T.serial((last - first) % streams):
                        tile(output, w, q, bias, [last - 1 - j], [0], k, prefetch)
                else:
                    for j in T.serial((last - first) // PAIR):
                        table_rows = T.meta_var([first + PAIR * j + i for i in range(PAIR)])
                        for r in T.serial(rows // ROWS):
                            at = T.meta_var([ROWS * r + i for i in range(ROWS)])
                            tile(output, w, q, bias, table_rows, at, k, 0)
                        for r in T.serial(rows % ROWS):
                            tile(output, w, q, bias, table_rows, [rows - 1 - r], k, 0)
                    if (last - first) % PAIR != 0:
                        for m in T.serial(rows):
                            tile(output, w, q, bias, [last - 1], [m], k, 0)

    return int8_matmul
