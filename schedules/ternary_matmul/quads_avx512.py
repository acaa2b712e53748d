"""Ungated ternary_matmul on AVX-512 VNNI: codes stay where they lie in their bytes.

Output-stationary. 64 bytes of the layout hold four columns of 64 outputs; masked by 3 << 2f they
are field f's codes {0, 1, 2} times 4**f, unsigned bytes, of which `vpdpbusd` adds four products to
an int32. No shift is needed: the sum is shifted right by 2f at the end, and sum(q) taken off.

    for thread in threads:                              parallel, a share of the blocks each
        qs[TILE_M, 4Q] = rows of q                      zeros behind K
        M = 1:  for b in share/STREAMS:                 streams far apart, each one long run
                    for quad in Q:                      4 STREAMS registers of sums
                        sums[s, f] += dot(w[b + s share/STREAMS, quad] & 3 << 2f, qs[quad])
        M > 1:  for b in share:                         41 KB of weights at K = 2560
                    for rows of the tile by ROWS:       4 ROWS registers of sums
                        for quad in Q: as above

    tile     | value         | bound by
    STREAMS  | 4             | 32 registers: 16 sums, 4 masks, weights: knob
    PREFETCH | 2048          | bytes ahead in a stream, over the end of a page: knob
    ROWS     | 6             | 32 registers: 24 sums, 4 codes, weights: knob
    TILE_M   | of l2_bytes   | rows of q in half of L2
    task     | 1 block       | the least that is worth waking a thread for: knob

|sum| <= 64 * 2 * 128 K: 32 bits hold it for K < 2**17.
Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, best of 7 or 9 interleaved runs, cold,
INT8 activations (INT4's are the same), against avx2.py's INT4 and INT8: one token, 2560 x 2560, two
threads 75 us (116, 253; without prefetch 88, 1 stream 107, 2 streams 79); 2560 x 6912, one thread
318 us (490, 1032). 128 tokens, 2560 x 2560, two threads 2.49 ms (4.40, 8.54); 4 rows 2.59.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, avx512, threads
from schedules.layouts import num_quads
from schedules.targets import CpuTarget
from schedules.ternary_matmul.rows_x86 import copy_row

LAYOUT = "quads_2bit"
BLOCK = 64  # outputs in a block of the layout
FIELDS = 4
GROUP = BLOCK // FIELDS  # outputs of a field


def masks() -> list[Expr]:
    """Field f's bits of every byte."""
    return [T.Bind(T.broadcast(T.uint8(3 << 2 * f), avx512.LINE)) for f in range(FIELDS)]


def sum_row(totals, to, qs, r):
    """totals[to] = sum of row r of qs"""
    (lanes,) = avx2.registers(1, "int32", 16)
    with T.serial(int(qs.shape[1]) // avx512.LINE) as v:
        ones = T.broadcast(T.uint8(1), avx512.LINE)
        codes = avx2.load(qs, r, avx512.LINE * v, lanes=64)
        total = avx512.dot_bytes(avx2.load(lanes, 0, lanes=16), ones, codes)
        avx2.store(lanes, 0, value=total, lanes=16)
    T.buffer_store(totals, avx2.sum_lanes(avx2.load(lanes, 0, lanes=16)), [to])


def quad_of(qs, *index) -> Expr:
    """Four neighbours from an index on in every 32 bits"""
    four = T.reinterpret("int32", avx2.load(qs, *index, lanes=4))
    return T.reinterpret("int8x64", T.broadcast(four, 16))


def accumulate(sums32, w, qs, blocks, rows, prefetch: int):
    """sums32[(i * len(rows) + j) * FIELDS + f, 16] = sums of field f over all of K"""
    count = len(blocks) * len(rows) * FIELDS
    sums = avx2.registers(count, "int32", GROUP)
    field_masks = masks()
    with T.serial(w.shape[1]) as quad:
        activations = [T.Bind(quad_of(qs, r, 4 * quad)) for r in rows]
        for i, b in enumerate(blocks):
            bytes_ = T.Bind(avx2.load(w, b, quad, 0, lanes=avx512.LINE))
            if prefetch:
                avx2.prefetch(w, b, quad + prefetch // avx512.LINE, 0)
            for f, mask in enumerate(field_masks):
                codes = T.Bind(bytes_ & mask)
                for j, activation in enumerate(activations):
                    so_far = sums[(i * len(rows) + j) * FIELDS + f]
                    total = avx512.dot_bytes(avx2.load(so_far, 0, lanes=GROUP), codes, activation)
                    avx2.store(so_far, 0, value=total, lanes=GROUP)
    for at, total in enumerate(sums):
        avx2.store(sums32, at, 0, value=avx2.load(total, 0, lanes=GROUP), lanes=GROUP)


def unscaled(sums32, at, j, lanes: int, total) -> Expr:
    """Outputs from j on of a block whose sums begin at sums32[at], `total` taken off"""
    shift = T.broadcast(2 * (j // GROUP), lanes) if lanes > 1 else 2 * (j // GROUP)
    found = avx2.load(sums32, at + j // GROUP, j % GROUP, lanes=lanes)
    return T.shift_right(found, shift) - total


def tile(output, w, qs, totals, m, b, step, blocks: int, r, rows: int, prefetch: int):
    """out of blocks b, b + step, ... and of rows m + r, m + r + 1, ..."""
    sums32 = T.alloc_buffer((blocks * rows * FIELDS, GROUP), "int32")
    every_b, every_r = [b + step * i for i in range(blocks)], [r + i for i in range(rows)]
    accumulate(sums32, w, qs, every_b, every_r, prefetch)
    with T.serial(blocks) as i, T.serial(rows) as j:

        def finished(column, lanes):
            return unscaled(sums32, (i * rows + j) * FIELDS, column, lanes, totals[r + j])

        output.store(m + r + j, b + step * i, BLOCK, finished)


def one_row(output, w, qs, totals, m, first, share, streams: int, prefetch: int):
    """out[m] for `share` blocks from `first` on; qs[0] is the row"""
    run = T.Bind(share // streams)
    with T.serial(run) as j:
        tile(output, w, qs, totals, m, first + j, run, streams, 0, 1, prefetch)
    if streams > 1:
        with T.serial(share % streams) as j:
            tile(output, w, qs, totals, m, first + streams * run + j, 0, 1, 0, 1, prefetch)


def many_rows(output, w, qs, totals, m, height, b, rows: int):
    """out[m : m + height] of block b"""
    with T.serial(height // rows) as r:
        tile(output, w, qs, totals, m, b, 0, 1, rows * r, rows, 0)
    if rows > 1:
        with T.serial(height % rows) as i:
            tile(output, w, qs, totals, m, b, 0, 1, height // rows * rows + i, 1, 0)


def any_rows(output, w, qs, totals, m, height, first, share, streams, prefetch, rows):
    """out[m : m + height] for `share` blocks from `first` on, by the form that suits the height"""
    with T.If(height == 1):
        with T.Then():
            one_row(output, w, qs, totals, m, first, share, streams, prefetch)
        with T.Else(), T.serial(share) as b:
            many_rows(output, w, qs, totals, m, height, first + b, rows)


def tile_height(k: int, multiple: int, target: CpuTarget, l2_eighths: int = 4) -> int:
    """Rows of q that these eighths of L2 hold."""
    near_bytes = target.l2_bytes * l2_eighths // 8
    return max(multiple, near_bytes // (4 * num_quads(k)) // multiple * multiple)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    epilogue: str,
    *,
    streams: int,
    prefetch: int,
    rows: int,
    blocks_a_task: int,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    blocks, quads = -(-n // BLOCK), num_quads(k)
    tile_m = tile_height(k, rows, target)
    num_rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((num_rows, k), "int8"),
        scale: T.Buffer((num_rows,), "float32"),
        w: T.Buffer((blocks, quads, 64), "uint8"),
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
                qs = T.alloc_buffer((tile_m, 4 * quads), "int8")
                totals = T.alloc_buffer((tile_m,), "int32")
                for tile_index in T.serial(T.ceildiv(T.cast(num_rows, "int32"), tile_m)):
                    m = T.meta_var(tile_index * tile_m)
                    height = T.min(T.cast(num_rows, "int32") - m, tile_m)
                    for r in T.serial(height):
                        copy_row(qs, r, q, m + r, k)
                        sum_row(totals, r, qs, r)
                    any_rows(
                        output, w, qs, totals, m, height, first, share, streams, prefetch, rows
                    )

    return end.finish(ternary_matmul)
