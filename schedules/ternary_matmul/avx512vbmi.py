"""ternary_matmul on AVX-512 VBMI: 1.67 bits a weight, by look-ups; many rows of INT8 multiplied.
With a gate: avx512vnni.py's rows by gate.

`lookup_avx512.py` has the look-ups. With 8-bit activations they take two tables a row, so that
from LOOKUP_ROWS on it is quicker to unpack a block's codes and multiply:

    for thread in threads:                              parallel, a share of the blocks each
        qs[TILE_M, K] = rows of q                       zeros behind K
        for b in share:
            codes[K/64, 4, 16, 64] = w[b]               64 K bytes, L2
            for rows of the tile by ROWS:               4 ROWS registers of sums
                for quad in K/4:
                    sums[r, f] += dot(codes[quad, f], qs[r, quad])

    tile        | value       | bound by
    LOOKUP_ROWS | 6           | of 8-bit activations: look-ups of six cost what unpacking costs
    ROWS        | 6           | 32 registers: 24 sums, 4 codes, activations
    TILE_M      | of l2_bytes | tables or rows of q in half of L2

Measured: as lookup_avx512.py, 2560 x 2560, two threads, 128 tokens as a share of avx512vnni.py's
time: INT4 0.90, INT8 0.98.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, avx512, threads
from schedules.layouts import LAYOUTS
from schedules.targets import CpuTarget
from schedules.ternary_matmul import avx512vnni, lookup_avx512
from schedules.ternary_matmul.quads_avx512 import quad_of, sum_row
from schedules.ternary_matmul.rows_x86 import copy_row
from schedules.ternary_matmul.triples_avx512 import (
    BLOCK,
    FIELDS,
    LINE,
    QUADS_A_LINE,
    clear_end,
    num_lines,
    unpack,
)

LOOKUP_ROWS = 6
ROWS = 6
GROUP = BLOCK // FIELDS
KNOBS = {"streams": (4, 2, 1), "prefetch": (2048, 0, 4096), "blocks_a_task": (1, 8, 64)}


def layout(act_bits: int, epilogue: str = "scale") -> str:
    is_gated = EPILOGUES[epilogue].is_gated
    return avx512vnni.layout(act_bits, epilogue) if is_gated else "triples_5bit"


def tile(output, codes, qs, totals, m, b, r, height):
    """out[m + r : m + r + ROWS] of block b, whose codes these are, none past m + height"""
    sums = T.alloc_buffer((ROWS * FIELDS, GROUP), "int32", scope="local")  # registers
    avx2.clear(sums, ROWS * FIELDS, "int32", GROUP)
    with T.serial(qs.shape[1] // LINE) as at, T.serial(QUADS_A_LINE) as row:
        fields = [T.Bind(avx2.load(codes, at, f, row, 0, lanes=LINE)) for f in range(FIELDS)]
        for j in range(ROWS):
            activations = T.Bind(quad_of(qs, r + j, 4 * (QUADS_A_LINE * at + row)))
            for f, field in enumerate(fields):
                so_far = avx2.load(sums, FIELDS * j + f, 0, lanes=GROUP)
                total = avx512.dot_bytes(so_far, field, activations)
                avx2.store(sums, FIELDS * j + f, 0, value=total, lanes=GROUP)
    sums32 = T.alloc_buffer((ROWS, BLOCK), "int32", scope="local")
    for j in range(ROWS):
        for f in range(FIELDS):
            value = avx2.load(sums, FIELDS * j + f, 0, lanes=GROUP)
            avx2.store(sums32, j, GROUP * f, value=value, lanes=GROUP)
    with T.serial(T.min(ROWS, height - r)) as j:

        def finished(column, lanes):
            return avx2.load(sums32, j, column, lanes=lanes) - totals[r + j]

        output.store(m + r + j, b, BLOCK, finished)


def multiply(output, q, w, num_rows, first, share, k: int, tile_m: int):
    """out[:num_rows] for `share` blocks from `first` on, `tile_m` rows at a time"""
    lines = -(-k // LINE)
    qs = T.alloc_buffer((tile_m, LINE * lines), "int8")
    totals = T.alloc_buffer((tile_m,), "int32")
    codes = T.alloc_buffer((num_lines(w), FIELDS, QUADS_A_LINE, LINE), "uint8")
    clear_end(codes)
    with T.serial(T.ceildiv(num_rows, tile_m)) as tile_index:
        m = tile_index * tile_m
        height = T.Bind(T.min(num_rows - m, tile_m))
        with T.serial(height) as r:
            copy_row(qs, r, q, m + r, k)
            sum_row(totals, r, qs, r)
        with T.serial(share) as b:
            unpack(codes, w, first + b)
            with T.serial(T.ceildiv(height, ROWS)) as r:
                tile(output, codes, qs, totals, m, first + b, ROWS * r, height)


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: CpuTarget,
    epilogue: str,
    *,
    streams: int = 4,
    prefetch: int = 2048,
    blocks_a_task: int = 1,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    if end.is_gated:
        walk = {"streams": streams, "prefetch": prefetch, "blocks_a_task": blocks_a_task}
        return avx512vnni.kernel(n, k, act_bits, target, epilogue, **walk)
    blocks, groups, _ = LAYOUTS["triples_5bit"].packed_shape(n, k)
    near_bytes = target.l2_bytes // 2
    table_rows = lookup_avx512.tile_height(k, act_bits, near_bytes)
    tile_m = max(ROWS, near_bytes // k // ROWS * ROWS)
    num_rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((num_rows, k), "int8"),
        scale: T.Buffer((num_rows,), "float32"),
        w: T.Buffer((blocks, groups, 320), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((num_rows, n), "float32"),
        out: T.Buffer((num_rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        rows = T.meta_var(T.cast(num_rows, "int32"))
        with T.sblock("root"):
            tasks = T.min(threads.count(), -(-blocks // blocks_a_task))
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                if rows < LOOKUP_ROWS or act_bits == 4:
                    lookup_avx512.multiply(
                        output, q, w, rows, first, share, k, act_bits, table_rows, streams, prefetch
                    )
                else:
                    multiply(output, q, w, rows, first, share, k, tile_m)

    return end.finish(ternary_matmul)
