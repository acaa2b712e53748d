"""ternary_matmul on AMX: prompts by tiles of 16 x 16 outputs, a few rows as avx512vnni.py.

    for thread in threads:                              parallel, a share of the blocks each
        qs[TILE_M, 4Q] = rows of q                      zeros behind K and M
        M < 16: as avx512vnni.py
        M >= 16:
            for b in share:
                codes[K/64, 4, 16, 64] = 3 << 2f masks of w[b]     64 K bytes, within L2
                for rows of the tile by 32, fields by 2:           four tiles of sums
                    for kk in K/64:                     two tiles of q, two of codes
                        sums[i, f] += q[i, kk] * codes[kk, f]      four tdpbsud, 64 cycles
                    sums32[32, 64] = the tiles                     L1, then the epilogue

    tile    | value       | bound by
    32 x 32 | 2 x 2       | 8 tiles: 4 sums, 2 of q, 2 of codes
    TILE_M  | of l2_bytes | rows of q in half of L2

A quad of columns of 16 outputs is a row of a tile as the layout stores it: unpacking is a mask.
Measured: Sapphire Rapids class Xeon, 2 cores, 2026-11-22, best of 7 interleaved runs, 128 tokens:
2560 x 2560, two threads 1.55 ms (avx512vnni.py 2.49, avx2.py INT4 4.40, INT8 8.54); 2560 x 6912,
one thread 3.78 ms (11.7, 18.3, 51.3): 1200 G op/s.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import amx, avx2, avx512, threads
from schedules.layouts import num_quads
from schedules.targets import CpuTarget
from schedules.ternary_matmul import avx512vnni
from schedules.ternary_matmul.avx512vnni import BLOCK, FIELDS, copy_row, many_rows, one_row

HEIGHT = 2 * amx.ROWS  # rows of q at once
KNOBS = avx512vnni.KNOBS
SUMS, ACTIVATIONS, CODES = (0, 1, 2, 3), (4, 5), (6, 7)  # numbers of tiles


def layout(act_bits: int) -> str:
    return avx512vnni.layout(act_bits)


def unpack(codes, w, b):
    """codes[kk, f, quad % 16] = field f of block b, times 4**f"""
    with T.serial(w.shape[1] // amx.ROWS) as kk, T.serial(amx.ROWS) as row:
        bytes_ = T.Bind(avx2.load(w, b, kk * amx.ROWS + row, 0, lanes=avx512.LINE))
        for f, mask in enumerate(avx512vnni.masks()):
            avx2.store(codes, kk, f, row, 0, value=bytes_ & mask, lanes=avx512.LINE)


def multiply(sums32, codes, qs, r, fields: int):
    """sums32[:32, 16 fields :][:32] = rows of qs from r on times two fields from `fields` on"""
    for tile in SUMS:
        amx.clear(tile)
    row_bytes = int(qs.shape[1])
    with T.serial(codes.shape[0]) as kk:
        for i, tile in enumerate(ACTIVATIONS):
            amx.load(tile, qs, r + amx.ROWS * i, 64 * kk, row_bytes=row_bytes)
        for j, tile in enumerate(CODES):
            amx.load(tile, codes, kk, fields + j, 0, 0, row_bytes=amx.ROW_BYTES)
        for at, tile in enumerate(SUMS):
            amx.dot_bytes(tile, ACTIVATIONS[at // 2], CODES[at % 2])
    for at, tile in enumerate(SUMS):
        column = amx.ROWS * (fields + at % 2)
        amx.store(tile, sums32, amx.ROWS * (at // 2), column, row_bytes=4 * BLOCK)


def tile_block(output, codes, sums32, qs, totals, m, height, b):
    """out[m : m + height] of block b, whose codes are unpacked"""
    with T.serial(T.ceildiv(height, HEIGHT)) as r0:
        r = r0 * HEIGHT
        for fields in range(0, FIELDS, 2):
            multiply(sums32, codes, qs, r, fields)
        with T.serial(T.min(height - r, HEIGHT)) as i:

            def finished(column, lanes):
                field = column // amx.ROWS
                shift = T.broadcast(2 * field, lanes) if lanes > 1 else 2 * field
                found = avx2.load(sums32, i, column, lanes=lanes)
                return T.shift_right(found, shift) - totals[r + i]

            output.store(m + r + i, b, BLOCK, finished)


def clear_rows(qs, totals, height):
    """Zeros in the rows behind `height` up to a multiple of HEIGHT"""
    with T.serial(-height % HEIGHT) as r, T.serial(int(qs.shape[1]) // 64) as v:
        zeros = T.broadcast(T.int8(0), avx512.LINE)
        avx2.store(qs, height + r, 64 * v, value=zeros, lanes=avx512.LINE)


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
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    blocks, quads = -(-n // BLOCK), num_quads(k)
    tile_m = avx512vnni.tile_height(k, HEIGHT, target)
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
            tasks = T.min(threads.count(), blocks)
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                qs = T.alloc_buffer((tile_m, 4 * quads), "int8")
                totals = T.alloc_buffer((tile_m,), "int32")
                for tile_index in T.serial(T.ceildiv(T.cast(num_rows, "int32"), tile_m)):
                    m = T.meta_var(tile_index * tile_m)
                    height = T.min(T.cast(num_rows, "int32") - m, tile_m)
                    for r in T.serial(height):
                        copy_row(qs, totals, q, m + r, r, k)
                    if height == 1:
                        one_row(output, w, qs, totals, m, first, share, streams, prefetch)
                    elif height < amx.ROWS:
                        for b in T.serial(share):
                            many_rows(output, w, qs, totals, m, height, first + b, rows)
                    else:
                        codes = T.alloc_buffer((quads // amx.ROWS, FIELDS, amx.ROWS, 64), "uint8")
                        sums32 = T.alloc_buffer((HEIGHT, BLOCK), "int32")
                        palette = T.alloc_buffer((64,), "uint8")
                        amx.configure(palette)
                        clear_rows(qs, totals, height)
                        for b in T.serial(share):
                            unpack(codes, w, first + b)
                            tile_block(output, codes, sums32, qs, totals, m, height, first + b)
                        amx.release()

    return end.finish(ternary_matmul)
