"""ternary_matmul on AMX: prompts by tiles of 16 x 16 outputs, a few rows as avx512vnni.py, whose
layouts it reads, `quads_2bit` and where there is a gate `rows_256`.

    for thread in threads:                              parallel, a share of the blocks each
        M < 16: as avx512vnni.py
        M >= 16:
            tiles[TILE_M/16, K/64, 16, 64] = q          zeros behind K; rows past M are not read out
            for b in share:
                codes[K/64, 4, 16, 64] = unpack(w[b])   64 K bytes, within L2: a byte a weight
                for rows of the tile by 32, groups of 16 outputs by 2:      four tiles of sums
                    for kk in K/64:                     two tiles of q, two of codes; those of
                                                        TILES_AHEAD steps on are prefetched to L1
                        sums[i, g] += tiles[i, kk] * codes[kk, g]  four tdpbsud, 64 cycles
                    sums32[32, 64] = the tiles                     L1, then the epilogue

    tile        | value       | bound by
    32 x 32     | 2 x 2       | 8 tiles: 4 sums, 2 of q, 2 of codes
    TILE_M      | of l2_bytes | rows of q in half of L2: knob, in eighths
    TILES_AHEAD | 0           | 64 lines a step of 64 cycles: knob

A row of a tile of codes is a quad of columns of 16 outputs. `quads_2bit` stores it so: unpacking is
a mask, 3 << 2g, and sums are shifted right by 2g at the end. Of `rows_256` 16 rows are transposed,
and the codes shifted; prompts read every row of w, whatever the gates. The next block's rows are
prefetched during the products: without that 0 to 3 % slower than `quads_2bit`, with it 5 % quicker.
Measured: Sapphire Rapids class Xeon, 2 cores, busy, 2026-11-22, best of 7 interleaved runs, 128
tokens, one thread: 2560 x 2560 1.39 ms (avx512vnni.py 4.09), 2560 x 6912 3.78 ms (11.7; avx2.py
18.3 for INT4, 51.3): 1200 G op/s, a quarter of the peak. Rows of q at their own stride in place
of tiles: the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import amx, avx2, avx512, threads
from schedules.layouts import LAYOUTS
from schedules.targets import CpuTarget
from schedules.ternary_matmul import avx512vnni, quads_avx512, rows_avx512, rows_x86
from schedules.ternary_matmul.quads_avx512 import BLOCK, FIELDS, masks, sum_row
from schedules.ternary_matmul.rows_x86 import copy_row

HEIGHT = 2 * amx.ROWS  # rows of q at once
KNOBS = {**avx512vnni.KNOBS, "l2_eighths": (4, 2, 6), "tiles_ahead": (0, 1, 2)}
GROUPS = BLOCK // amx.ROWS  # tiles of codes of a block
SUMS, ACTIVATIONS, CODES = (0, 1, 2, 3), (4, 5), (6, 7)  # numbers of tiles


def layout(act_bits: int, epilogue: str = "scale") -> str:
    return avx512vnni.layout(act_bits, epilogue)


@dataclass(frozen=True)
class Form:
    """What depends on the layout of w."""

    columns: int  # of q, with those behind K
    unpack: Callable[..., None]  # (codes, w, b)
    shift: int  # bits from one group's codes to the next one's
    prefetch: Callable[..., None] | None  # (w, b, done, step): some of block b, others each step
    any_rows: Callable[..., None]  # out of a few rows of q


def unpack_quads(codes, w, b):
    """codes[kk, g, quad % 16] = field g of block b, times 4**g"""
    with T.serial(w.shape[1] // amx.ROWS) as kk, T.serial(amx.ROWS) as row:
        bytes_ = T.Bind(avx2.load(w, b, kk * amx.ROWS + row, 0, lanes=avx512.LINE))
        for g, mask in enumerate(masks()):
            avx2.store(codes, kk, g, row, 0, value=bytes_ & mask, lanes=avx512.LINE)


def unpack_rows(codes, w, b):
    """codes[kk, g, t] = columns 64 kk + 4 t on of rows 64 b + 16 g on; the rows behind those are
    prefetched"""
    with T.serial(GROUPS) as g, T.serial(w.shape[1]) as c:
        rows = [BLOCK * b + amx.ROWS * g + i for i in range(amx.ROWS)]
        for row in rows:
            avx2.prefetch(w, row + amx.ROWS, c, 0)
        lines = avx512.transpose([avx2.load(w, row, c, 0, lanes=avx512.LINE) for row in rows])
        for t, line in enumerate(lines):
            for f in range(FIELDS):
                field = avx2.shift_bytes(line, -2 * f)
                code = field & T.broadcast(T.uint8(3), avx512.LINE)
                avx2.store(codes, FIELDS * c + f, g, t, 0, value=code, lanes=avx512.LINE)


def prefetch_rows(w, b, done, step):
    """Two lines of block b a step: all of them in the steps of 128 rows of q"""
    for i in range(2):
        avx2.prefetch(w, BLOCK * b, 2 * (done + step) + i, 0)


def copy_tiles(tiles, totals, row, q, m, height, k: int):
    """tiles[r // 16, kk, r % 16] = 64 columns of row m + r of q, zeros up to whole pairs of tiles:
    TVM cuts a buffer down to what it sees in use, and does not see tile loads. totals[r] = sum"""
    with T.serial(height) as r:
        copy_row(row, 0, q, m + r, k)
        sum_row(totals, r, row, 0)
        with T.serial(tiles.shape[1]) as kk:
            value = avx2.load(row, 0, 64 * kk, lanes=64)
            avx2.store(tiles, r // amx.ROWS, kk, r % amx.ROWS, 0, value=value, lanes=64)
    with T.serial(-height % HEIGHT) as i, T.serial(tiles.shape[1]) as kk:
        r = height + i
        zeros = T.broadcast(T.int8(0), 64)
        avx2.store(tiles, r // amx.ROWS, kk, r % amx.ROWS, 0, value=zeros, lanes=64)


def clear(sums32):
    """All of the tiles' sums, of which TVM does not see the tile stores."""
    with T.serial(HEIGHT) as r, T.serial(BLOCK // 16) as v:
        avx2.store(sums32, r, 16 * v, value=T.broadcast(T.int32(0), 16), lanes=16)


def multiply(sums32, codes, tiles, r0, group: int, ahead: int, at_step=None):
    """sums32[:32, 16 group :][:32] = two tiles of rows from r0 on times two groups of
    outputs; `at_step` emits what else is done at each step"""
    for tile in SUMS:
        amx.clear(tile)
    with T.serial(tiles.shape[1]) as kk:
        if at_step:
            at_step(kk)
        if ahead:
            for row in range(amx.ROWS):
                for i in range(2):
                    avx2.prefetch(tiles, r0 + i, kk + ahead, row, 0)
                    avx2.prefetch(codes, kk + ahead, group + i, row, 0)
        for i, tile in enumerate(ACTIVATIONS):
            amx.load(tile, tiles, r0 + i, kk, 0, 0, row_bytes=amx.ROW_BYTES)
        for j, tile in enumerate(CODES):
            amx.load(tile, codes, kk, group + j, 0, 0, row_bytes=amx.ROW_BYTES)
        for at, tile in enumerate(SUMS):
            amx.dot_bytes(tile, ACTIVATIONS[at // 2], CODES[at % 2])
    for at, tile in enumerate(SUMS):
        column = amx.ROWS * (group + at % 2)
        amx.store(tile, sums32, amx.ROWS * (at // 2), column, row_bytes=4 * BLOCK)


def tile_block(
    output, codes, sums32, tiles, totals, m, height, b, ahead: int, shift: int = 0, prefetch=None
):
    """out[m : m + height] of block b, whose codes are unpacked, `shift` bits more a group;
    prefetch(done, step): the next block's bytes, some each step"""
    steps = int(codes.shape[0])
    with T.serial(T.ceildiv(height, HEIGHT)) as r0:
        r = r0 * HEIGHT
        for group in range(0, GROUPS, 2):
            done = steps * (GROUPS // 2 * r0 + group // 2)
            at_step = partial(prefetch, done) if prefetch else None
            multiply(sums32, codes, tiles, 2 * r0, group, ahead, at_step)
        with T.serial(T.min(height - r, HEIGHT)) as i:

            def finished(column, lanes):
                found = avx2.load(sums32, i, column, lanes=lanes)
                if shift:
                    by = shift * (column // amx.ROWS)
                    found = T.shift_right(found, T.broadcast(by, lanes) if lanes > 1 else by)
                return found - totals[r + i]

            output.store(m + r + i, b, BLOCK, finished)


def tiled(output, q, w, row, totals, m, height, first, share, k, tile_m, form: Form, ahead: int):
    """out[m : m + height] for `share` blocks from `first` on; `row` is scratch"""
    steps = form.columns // amx.ROW_BYTES
    tiles = T.alloc_buffer((tile_m // amx.ROWS, steps, amx.ROWS, amx.ROW_BYTES), "int8")
    codes = T.alloc_buffer((steps, GROUPS, amx.ROWS, amx.ROW_BYTES), "uint8")
    sums32 = T.alloc_buffer((HEIGHT, BLOCK), "int32")
    palette = T.alloc_buffer((64,), "uint8")
    amx.configure(palette)
    clear(sums32)
    copy_tiles(tiles, totals, row, q, m, height, k)
    with T.serial(share) as b:
        form.unpack(codes, w, first + b)
        block = first + b
        prefetch = partial(form.prefetch, w, block + 1) if form.prefetch else None
        tile_block(
            output, codes, sums32, tiles, totals, m, height, block, ahead, form.shift, prefetch
        )
    amx.release()


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: CpuTarget,
    epilogue: str,
    *,
    streams: int = 4,
    prefetch: int = 2048,
    rows: int = 6,
    blocks_a_task: int = 1,
    l2_eighths: int = 4,
    tiles_ahead: int = 0,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    w_shape = LAYOUTS[layout(act_bits, epilogue)].packed_shape(n, k)
    if end.is_gated:
        avx512vnni.refuse_rows(rows)
        walk = rows_x86.Walk(rows_avx512.VECTORS, streams, prefetch, target.l2_bytes // 2)
        by_gate = partial(rows_x86.any_rows, walk=walk)
        form = Form(rows_x86.CHUNK * w_shape[1], unpack_rows, 0, prefetch_rows, by_gate)
    else:
        every = partial(quads_avx512.any_rows, streams=streams, prefetch=prefetch, rows=rows)
        form = Form(4 * w_shape[1], unpack_quads, 2, None, every)
    blocks = -(-n // BLOCK)
    tile_m = quads_avx512.tile_height(form.columns, HEIGHT, target, l2_eighths)
    num_rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((num_rows, k), "int8"),
        scale: T.Buffer((num_rows,), "float32"),
        w: T.Buffer(w_shape, "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((num_rows, n), "float32"),
        out: T.Buffer((num_rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        with T.sblock("root"):
            if num_rows >= amx.ROWS:
                amx.request()
            tasks = T.min(threads.count(), -(-blocks // blocks_a_task))
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                row = T.alloc_buffer((amx.ROWS, form.columns), "int8")
                totals = T.alloc_buffer((tile_m,), "int32")
                for tile_index in T.serial(T.ceildiv(T.cast(num_rows, "int32"), tile_m)):
                    m = T.meta_var(tile_index * tile_m)
                    height = T.min(T.cast(num_rows, "int32") - m, tile_m)
                    if height < amx.ROWS:
                        for r in T.serial(height):
                            copy_row(row, r, q, m + r, k)
                            sum_row(totals, r, row, r)
                        form.any_rows(output, w, row, totals, m, height, first, share)
                    else:
                        tiled(
                            output, q, w, row, totals, m, height, first, share, k, tile_m, form,
                            tiles_ahead,
                        )  # fmt: skip

    return end.finish(ternary_matmul)
