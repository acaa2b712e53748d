"""ternary_matmul on AMX: prompts by tiles of 16 x 16 outputs, a few rows as avx512vnni.py.

    for thread in threads:                              parallel, a share of the blocks each
        M < 16: as avx512vnni.py
        M >= 16:
            tiles[TILE_M/16, K/64, 16, 64] = q          zeros behind K; rows past M are not read out
            for b in share:
                codes[K/64, 4, 16, 64] = 3 << 2f masks of w[b]     64 K bytes, within L2
                for rows of the tile by 32, fields by 2:           four tiles of sums
                    for kk in K/64:                     two tiles of q, two of codes; those of
                                                        TILES_AHEAD steps on are prefetched to L1
                        sums[i, f] += tiles[i, kk] * codes[kk, f]  four tdpbsud, 64 cycles
                    sums32[32, 64] = the tiles                     L1, then the epilogue

    tile        | value       | bound by
    32 x 32     | 2 x 2       | 8 tiles: 4 sums, 2 of q, 2 of codes
    TILE_M      | of l2_bytes | rows of q in half of L2: knob, in eighths
    TILES_AHEAD | 0           | 64 lines a step of 64 cycles: knob

A quad of columns of 16 outputs is a row of a tile as the layout stores it: unpacking is a mask.
Measured: Sapphire Rapids class Xeon, 2 cores, busy, 2026-11-22, best of 7 interleaved runs, 128
tokens, one thread: 2560 x 2560 1.39 ms (avx512vnni.py 4.09), 2560 x 6912 3.78 ms (11.7; avx2.py
18.3 for INT4, 51.3): 1200 G op/s, a quarter of the peak. Rows of q at their own stride in place
of tiles: the same.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import amx, avx2, avx512, threads
from schedules.layouts import num_quads
from schedules.targets import CpuTarget
from schedules.ternary_matmul import avx512vnni
from schedules.ternary_matmul.avx512vnni import BLOCK, FIELDS, copy_row, many_rows, one_row, sum_row

HEIGHT = 2 * amx.ROWS  # rows of q at once
KNOBS = {**avx512vnni.KNOBS, "l2_eighths": (4, 2, 6), "tiles_ahead": (0, 1, 2)}
SUMS, ACTIVATIONS, CODES = (0, 1, 2, 3), (4, 5), (6, 7)  # numbers of tiles


def layout(act_bits: int) -> str:
    return avx512vnni.layout(act_bits)


def unpack(codes, w, b):
    """codes[kk, f, quad % 16] = field f of block b, times 4**f"""
    with T.serial(w.shape[1] // amx.ROWS) as kk, T.serial(amx.ROWS) as row:
        bytes_ = T.Bind(avx2.load(w, b, kk * amx.ROWS + row, 0, lanes=avx512.LINE))
        for f, mask in enumerate(avx512vnni.masks()):
            avx2.store(codes, kk, f, row, 0, value=bytes_ & mask, lanes=avx512.LINE)


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


def multiply(sums32, codes, tiles, r0, fields: int, ahead: int):
    """sums32[:32, 16 fields :][:32] = two tiles of rows from r0 on times two fields"""
    for tile in SUMS:
        amx.clear(tile)
    with T.serial(tiles.shape[1]) as kk:
        if ahead:
            for row in range(amx.ROWS):
                for i in range(2):
                    avx2.prefetch(tiles, r0 + i, kk + ahead, row, 0)
                    avx2.prefetch(codes, kk + ahead, fields + i, row, 0)
        for i, tile in enumerate(ACTIVATIONS):
            amx.load(tile, tiles, r0 + i, kk, 0, 0, row_bytes=amx.ROW_BYTES)
        for j, tile in enumerate(CODES):
            amx.load(tile, codes, kk, fields + j, 0, 0, row_bytes=amx.ROW_BYTES)
        for at, tile in enumerate(SUMS):
            amx.dot_bytes(tile, ACTIVATIONS[at // 2], CODES[at % 2])
    for at, tile in enumerate(SUMS):
        column = amx.ROWS * (fields + at % 2)
        amx.store(tile, sums32, amx.ROWS * (at // 2), column, row_bytes=4 * BLOCK)


def tile_block(output, codes, sums32, tiles, totals, m, height, b, ahead: int):
    """out[m : m + height] of block b, whose codes are unpacked"""
    with T.serial(T.ceildiv(height, HEIGHT)) as r0:
        r = r0 * HEIGHT
        for fields in range(0, FIELDS, 2):
            multiply(sums32, codes, tiles, 2 * r0, fields, ahead)
        with T.serial(T.min(height - r, HEIGHT)) as i:

            def finished(column, lanes):
                field = column // amx.ROWS
                shift = T.broadcast(2 * field, lanes) if lanes > 1 else 2 * field
                found = avx2.load(sums32, i, column, lanes=lanes)
                return T.shift_right(found, shift) - totals[r + i]

            output.store(m + r + i, b, BLOCK, finished)


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
    blocks, quads = -(-n // BLOCK), num_quads(k)
    tile_m = avx512vnni.tile_height(k, HEIGHT, target, l2_eighths)
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
            if num_rows >= amx.ROWS:
                amx.request()
            tasks = T.min(threads.count(), -(-blocks // blocks_a_task))
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                row = T.alloc_buffer((amx.ROWS, 4 * quads), "int8")
                totals = T.alloc_buffer((tile_m,), "int32")
                for tile_index in T.serial(T.ceildiv(T.cast(num_rows, "int32"), tile_m)):
                    m = T.meta_var(tile_index * tile_m)
                    height = T.min(T.cast(num_rows, "int32") - m, tile_m)
                    if height < amx.ROWS:
                        for r in T.serial(height):
                            copy_row(row, r, q, m + r, k)
                            sum_row(totals, r, row, r)
                        if height == 1:
                            one_row(output, w, row, totals, m, first, share, streams, prefetch)
                        else:
                            for b in T.serial(share):
                                many_rows(output, w, row, totals, m, height, first + b, rows)
                    else:
                        tiles = T.alloc_buffer((tile_m // 16, quads // 16, 16, 64), "int8")
                        codes = T.alloc_buffer((quads // 16, FIELDS, 16, 64), "uint8")
                        sums32 = T.alloc_buffer((HEIGHT, BLOCK), "int32")
                        palette = T.alloc_buffer((64,), "uint8")
                        amx.configure(palette)
                        clear(sums32)
                        copy_tiles(tiles, totals, row, q, m, height, k)
                        for b in T.serial(share):
                            unpack(codes, w, first + b)
                            tile_block(
                                output, codes, sums32, tiles, totals, m, height, first + b,
                                tiles_ahead,
                            )  # fmt: skip
                        amx.release()

    return end.finish(ternary_matmul)
