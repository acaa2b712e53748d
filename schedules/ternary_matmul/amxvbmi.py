"""ternary_matmul on AVX-512 VBMI and AMX: 1.67 bits a weight; look-ups, and prompts by tiles.
With a gate: amx.py's rows by gate.

    for thread in threads:                              parallel, a share of the blocks each
        M < AMX_ROWS: as lookup_avx512.py
        M >= AMX_ROWS: as amx.py, but that codes[K/64, 4, 16, 64] are unpacked from triples

    tile     | value       | bound by
    AMX_ROWS | 16 or 12    | of 4- and of 8-bit activations: look-ups of so many rows take longer
    TILE_M   | of l2_bytes | tables or rows of q in half of L2: knob, in eighths

Measured: as lookup_avx512.py, 2560 x 2560, two threads, 16, 128 and 512 tokens as a share of
amx.py's time: 0.95, 0.97, 1.00 (INT8 0.96, 0.96, 1.00).
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import amx as tiles_of
from schedules.intrin import threads
from schedules.layouts import LAYOUTS
from schedules.targets import CpuTarget
from schedules.ternary_matmul import amx, lookup_avx512
from schedules.ternary_matmul.amx import HEIGHT
from schedules.ternary_matmul.triples_avx512 import (
    BLOCK,
    FIELDS,
    LINE,
    clear_end,
    num_lines,
    unpack,
)

AMX_ROWS = {4: 16, 8: 12}
KNOBS = {name: values for name, values in amx.KNOBS.items() if name != "rows"}


def layout(act_bits: int, epilogue: str = "scale") -> str:
    is_gated = EPILOGUES[epilogue].is_gated
    return amx.layout(act_bits, epilogue) if is_gated else "triples_5bit"


def multiply(output, q, w, num_rows, first, share, k: int, tile_m: int, ahead: int):
    """out[:num_rows] for `share` blocks from `first` on, `tile_m` rows at a time"""
    lines = -(-k // LINE)
    row = T.alloc_buffer((1, LINE * lines), "int8")
    totals = T.alloc_buffer((tile_m,), "int32")
    tiles = T.alloc_buffer((tile_m // 16, lines, 16, LINE), "int8")
    codes = T.alloc_buffer((num_lines(w), FIELDS, 16, LINE), "uint8")
    sums32 = T.alloc_buffer((HEIGHT, BLOCK), "int32")
    palette = T.alloc_buffer((LINE,), "uint8")
    tiles_of.configure(palette)
    amx.clear(sums32)
    clear_end(codes)
    with T.serial(T.ceildiv(num_rows, tile_m)) as tile_index:
        m = tile_index * tile_m
        height = T.Bind(T.min(num_rows - m, tile_m))
        amx.copy_tiles(tiles, totals, row, q, m, height, k)
        with T.serial(share) as b:
            unpack(codes, w, first + b)
            amx.tile_block(output, codes, sums32, tiles, totals, m, height, first + b, ahead)
    tiles_of.release()


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
    l2_eighths: int = 4,
    tiles_ahead: int = 0,
) -> PrimFunc:
    end, few = EPILOGUES[epilogue], AMX_ROWS[act_bits]
    if end.is_gated:
        knobs = {"l2_eighths": l2_eighths, "tiles_ahead": tiles_ahead, "prefetch": prefetch}
        knobs |= {"streams": streams, "blocks_a_task": blocks_a_task}
        return amx.kernel(n, k, act_bits, target, epilogue, **knobs)
    blocks, groups, _ = LAYOUTS["triples_5bit"].packed_shape(n, k)
    near_bytes = target.l2_bytes * l2_eighths // 8
    tile_m = max(HEIGHT, near_bytes // k // HEIGHT * HEIGHT)
    table_rows = lookup_avx512.tile_height(k, act_bits, near_bytes)
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
        height = T.meta_var(T.cast(num_rows, "int32"))
        with T.sblock("root"):
            if height >= few:
                tiles_of.request()
            tasks = T.min(threads.count(), -(-blocks // blocks_a_task))
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                if height < few:
                    lookup_avx512.multiply(
                        output,
                        q,
                        w,
                        height,
                        first,
                        share,
                        k,
                        act_bits,
                        table_rows,
                        streams,
                        prefetch,
                    )
                else:
                    multiply(output, q, w, height, first, share, k, tile_m, tiles_ahead)

    return end.finish(ternary_matmul)
