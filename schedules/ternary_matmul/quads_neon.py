"""ternary_matmul with dot products of int8: weights by quads of columns, 4- and 8-bit activations.

A byte of the layout is four rows' weights of one column, x = c0 + 4 c1 + 16 c2 + 64 w3 as signed,
c = w + 1. For one row of activations nothing is unpacked: with S_f the sum over K of field f,

    S0 = (x & 3) . q,  S0 + 4 S1 = (x & 15) . q,  ... + 16 S2 = (x & 63) . q,  ... + 64 S3 = x . q

so that three masks and four dot products serve 64 weights, and differences and shifts once a row
give the sums; c . q - sum(q) = w . q. For more rows weights are unpacked once (tiles_neon.py).

    for thread in threads:                          parallel, a share of the blocks each
        M < wide: for b in share, m in M:           8 registers of sums, 2 of weights, 1 of 16 q
                      for 16 columns of K:          4 quads of 32 bytes: masks, dot products
        else:     tiles of rows, `sdot` or `smmla`

|x . q| <= 106 * 128 K holds in int32 for K < 150,000. Instructions of one row, 16 columns of 32
rows: 24 masks, 32 dot products, 5 loads, 4 of the loop, 0.127 a weight. Counted: docs/log.md.
"""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import neon, threads
from schedules.intrin.lanes import clear, load, splat, store
from schedules.targets import CpuTarget
from schedules.ternary_matmul.tiles_neon import (
    BLOCK,
    DOT,
    STEP,
    Form,
    Tiles,
    copy_rows,
    padded,
    store_pairs,
    sum_rows,
    tile_rows,
)

FIELDS = 4


# ---- One row


def masked(bytes_):
    """x & 3, x & 15, x & 63, x, as int8x16"""
    masks = [splat("int8", m, 16) for m in (3, 15, 63)]
    return [*(T.Bind(bytes_ & mask) for mask in masks), bytes_]


def row_sums(sum32, total, w, qs, r, b):
    """sum32[0, 32] = sums over K of the block's rows for row r of qs, whose sum is total[r]"""
    steps = int(qs.shape[1]) // STEP
    sums = T.alloc_buffer((2 * FIELDS, 4), "int32", scope="local")
    clear(sums, 2 * FIELDS, "int32", 4)
    with T.serial(steps) as step:
        activations = T.Bind(T.reinterpret("int32x4", load(qs, r, STEP * step, lanes=STEP)))
        found = [T.Bind(load(sums, i, 0, lanes=4)) for i in range(2 * FIELDS)]
        for p in range(4):
            quad = neon.quad(activations, p)
            halves = [T.Bind(load(w, b, 4 * step + p, 16 * h, lanes=16)) for h in (0, 1)]
            for h, bytes_ in enumerate(halves):
                for f, field in enumerate(masked(T.reinterpret("int8x16", bytes_))):
                    at = FIELDS * h + f
                    found[at] = T.Bind(neon.dot(found[at], field, quad))
        for i, value in enumerate(found):
            store(sums, i, 0, value=value, lanes=4)
    q_sum = T.broadcast(total[r], 4)
    for h in (0, 1):
        nested = [T.Bind(load(sums, FIELDS * h + f, 0, lanes=4)) for f in range(FIELDS)]
        for f in range(FIELDS):
            alone = nested[f] - nested[f - 1] if f else nested[f]
            field = T.shift_right(alone, splat("int32", 2 * f, 4))
            value = field - q_sum if f < 3 else field
            store(sum32, 0, 16 * h + 4 * f, value=value, lanes=4)


def row_block(output, total, w, qs, m, b):
    sums = T.alloc_buffer((1, BLOCK), "int32", scope="local")
    row_sums(sums, total, w, qs, m, b)
    output.store(m, b, BLOCK, lambda j, lanes: load(sums, 0, j, lanes=lanes))


# ---- Many rows


def codes_of(w, b, p, h):
    """int8x16 of w for each field of half h of quad p: [row][column] of 4 x 4 weights"""
    bytes_ = T.Bind(load(w, b, p, 16 * h, lanes=16))
    one = splat("int8", 1, 16)
    for f in range(FIELDS):
        if f == 3:
            signed = T.reinterpret("int8x16", bytes_)
            yield T.shift_right(signed, splat("int8", 6, 16))
        else:
            shifted = T.shift_right(bytes_, splat("uint8", 2 * f, 16)) if f else bytes_
            yield T.reinterpret("int8x16", shifted & splat("uint8", 3, 16)) - one


def unpack(w, form: Form, codes, b, p0, quads):
    """codes[:quads] = weights of block b from quad p0 on, as `Form` says"""
    if not form.has_pairs:
        with T.serial(quads) as p:
            for h in (0, 1):
                for f, code in enumerate(codes_of(w, b, p0 + p, h)):
                    store(codes, p, FIELDS * h + f, 0, value=code, lanes=16)
        return
    with T.serial(quads // 2) as pair:
        for h in (0, 1):
            sides = [[*codes_of(w, b, p0 + 2 * pair + side, h)] for side in (0, 1)]
            store_pairs(codes, pair, h, sides)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    epilogue: str,
    form: Form,
    *,
    wide: int = 2,
    l1_eighths: int = 4,
    l2_eighths: int = 4,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    blocks, columns = -(-n // BLOCK), padded(k)
    tiles = Tiles.of(form, k, target, l1_eighths, l2_eighths)
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((blocks, columns // 4, 32), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        unpack_block = T.meta_var(partial(unpack, w, form))
        height = T.meta_var(T.cast(rows, "int32"))
        with T.sblock("root"):
            tasks = T.min(threads.count(), blocks)
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                last = threads.share(blocks, task + 1, tasks)
                if height < wide:
                    total = T.alloc_buffer((wide,), "int32", scope="local")
                    one = T.alloc_buffer((wide, columns), "int8")
                    live = T.alloc_buffer((1,), "int32", scope="local")
                    copy_rows(one, q, 0, height, height, k, DOT)
                    sum_rows(total, q, 0, height, k)
                    for b in T.serial(first, last):
                        for m in T.serial(height):
                            output.mark_live(live, 0, m, b, BLOCK)
                            if live[0] != 0:
                                row_block(output, total, w, one, m, b)
                            else:
                                output.store_zeros(m, b, BLOCK)
                else:
                    tile_rows(output, unpack_block, q, height, first, last, tiles)

    return end.finish(ternary_matmul)
