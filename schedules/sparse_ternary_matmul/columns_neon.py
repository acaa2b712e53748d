"""sparse_ternary_matmul on NEON: ternary_matmul's walk over a list of columns, active ones only.

    for thread in threads:                          parallel, a share of the blocks each
        M < wide, or few active columns:
            for stripe in share:                    all of it for M < wide
                for m in M:                         the stripe is near for the next row
                    list the active columns         or all, where most are active
                    walk(list, stripe)
        else: tiled

    tile             | value | bound by
    most_eighths     | 6     | reading on beats following the list, whose runs end after a share
    batch_sixteenths | 4     | a tiled row costs some 3 times less a column than a walked one
    stripe           | 2     | a cache line of each column

Counted: docs/log.md.
"""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import threads
from schedules.targets import CpuTarget
from schedules.ternary_matmul import tiles_neon
from schedules.ternary_matmul.columns_neon import (
    BLOCK,
    FIELDS,
    finish,
    list_columns,
    padded,
    unpack,
    walk,
)
from schedules.ternary_matmul.tiles_neon import Form, Tiles, tile_rows

KNOBS = {
    "most_eighths": (6, 4, 8),  # of K: from here on a row walks every column
    "batch_sixteenths": (4, 1, 8, 16),  # of M K: from here on rows are tiled
    "stripe": (2, 1, 4),  # blocks
    "l2_eighths": (4, 2, 8),  # of the target's L2, for a tile of rows
}
WIDE = 4  # rows from which tiles pay, where enough columns are active


def layout() -> str:
    return "columns_2bit"


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    *,
    form: Form,
    most_eighths: int = 6,
    batch_sixteenths: int = 4,
    stripe: int = 2,
    l2_eighths: int = 4,
) -> PrimFunc:
    end = EPILOGUES["residual"]
    blocks, small_blocks = -(-n // BLOCK), -(-n // tiles_neon.BLOCK)
    most = -(-k * most_eighths // 8)
    tiles = Tiles.of(form, k, target, 4, l2_eighths)
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def sparse_ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        index: T.Buffer((rows, k), "int32"),
        count: T.Buffer((rows,), "int32"),
        w: T.Buffer((k, blocks, 32), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        unpack_block = T.meta_var(partial(unpack, w, k, form))
        height = T.meta_var(T.cast(rows, "int32"))
        with T.sblock("root"):
            tasks = T.min(threads.count(), blocks)
            active = T.int64(0)
            for m in T.serial(height):
                active += T.cast(count[m], "int64")
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                if height >= WIDE and active * 16 >= rows * k * batch_sixteenths:
                    last = T.min(FIELDS * (first + share), small_blocks)
                    tile_rows(output, unpack_block, q, height, FIELDS * first, last, tiles)
                else:
                    column = T.alloc_buffer((padded(k),), "int32")
                    qs = T.alloc_buffer((padded(k),), "int8")
                    total = T.alloc_buffer((1,), "int32", scope="local")
                    sum32 = T.alloc_buffer((blocks, BLOCK), "int32")
                    step = T.if_then_else(height < WIDE, share, stripe)
                    for s in T.serial(T.ceildiv(share, step)):
                        b = T.meta_var(first + s * step)
                        width = T.min(share - s * step, step)
                        for m in T.serial(height):
                            listed = T.if_then_else(count[m] < most, count[m], k)
                            if count[m] < most:
                                list_columns(
                                    column, qs, total, q, m, listed, lambda i, m=m: index[m, i]
                                )
                            else:
                                list_columns(column, qs, total, q, m, listed, lambda i: i)
                            walk(sum32, w, column, qs, listed, b, width, form)
                            finish(output, sum32, total, m, b, width)

    return end.finish(sparse_ternary_matmul)
