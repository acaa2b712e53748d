"""The outer loops of sparse_ternary_matmul on a CPU: which columns and outputs a thread walks.

    one row:     for thread in threads:             parallel, a share of the active columns each
                     list the columns               or all of K, where most are active
                     sums[thread] = walk(list, all blocks of outputs)
                 for b in blocks:                   parallel where threads are many
                     out = sum over threads of sums[thread, b]
    more rows:   for thread in threads:             parallel, a share of the blocks each
                     tiled, where that pays         several rows of q share unpacked codes
                     else for stripe in share:      all of it, or so narrow that it is near for
                         for m in M:                the next row
                             list the columns
                             sums = walk(list, stripe)

A row is split by columns because a column is one run of memory. Cut in two for two threads, the
runs of five lines cost more than half of those of ten: the hardware's prefetchers read on behind
each. It also leaves each thread its share of what is active, however many threads there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.columns import gather, list_length, write_columns
from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import threads
from schedules.intrin.lanes import add, load, prefetch

MAX_TASKS = 64  # that share the columns of a row
LANES = 16


@dataclass(frozen=True)
class Walk:
    """How an instruction set walks a list of columns."""

    block: int  # outputs in a block of the layout
    group: int  # columns at once
    # (sums, row, w, column, qs, count, first, blocks): sums[row + b, block] = sums of the listed
    # columns for block first + b, in the form that `value` reads
    columns: Callable[..., None]
    value: Callable[..., object]  # (sums, row, j, lanes): int32 sums of outputs from j on
    ahead: int = 0  # groups to prefetch


@dataclass(frozen=True)
class Tiles:
    """How it multiplies many rows, and when."""

    pays: Callable[..., object]  # (rows, active columns of all rows)
    multiply: Callable[..., None]  # (output, q, w, rows, first, blocks)
    stripe: Callable[..., object] | None = None  # (rows, share): blocks that a row walks at once


def finish(output, walk: Walk, sums, row, total, m, b):
    """out[m] of block b from sums[row]"""
    output.store(m, b, walk.block, lambda j, lanes: walk.value(sums, row, j, lanes) - total)


def finish_shares(output, walk: Walk, sums, totals, tasks, first, last):
    """out[0] of the blocks from the sums of every task"""
    blocks = -(-output.n // walk.block)
    # A loop of its own, so that many lines are on their way from other cores at once
    with T.serial(tasks - 1) as other, T.serial(last - first) as i:
        with T.serial(walk.block // LANES) as v:
            share = load(sums, (other + 1) * blocks + first + i, LANES * v, lanes=LANES)
            add(sums, first + i, LANES * v, value=share, lanes=LANES)
    with T.serial(last - first) as i:
        finish(output, walk, sums, first + i, totals[0, 0], 0, first + i)


def walk_row(walk: Walk, sums, row, total, w, q, index, m, first, count, is_listed, b, blocks):
    """sums[row + i] of block b + i, over `count` columns from the `first` active one on, or from
    column `first` on; total[0] = the sum of their q"""
    room = list_length(int(q.shape[1]), walk.group, walk.ahead)
    column, qs = T.alloc_buffer((room,), "int32"), T.alloc_buffer((room,), "int8")

    with T.If(is_listed):
        with T.Then():
            write_columns(column, count, walk.group, lambda i: index[m, first + i], walk.ahead)
        with T.Else():
            write_columns(column, count, walk.group, lambda i: first + i, walk.ahead)
    with T.If(count > 0), T.Then():  # memory is busy from here on, while q is gathered
        with T.serial(walk.ahead * walk.group) as i, T.serial(blocks) as j:
            prefetch(w, column[i], b + j, 0)
    gather(qs, total, q, m, column, count, walk.group)
    walk.columns(sums, row, w, column, qs, count, b, blocks)


def walk_rows(output, walk: Walk, tiles: Tiles, q, w, index, count, rows, most: int, first, share):
    """Row by row of q, for `share` blocks from `first` on"""
    k = int(q.shape[1])
    sums = T.alloc_buffer((int(w.shape[1]), walk.block), "int32")
    total = T.alloc_buffer((1,), "int32")
    step = T.Bind(tiles.stripe(rows, share) if tiles.stripe else share)
    with T.serial(T.ceildiv(share, step)) as s, T.serial(rows) as m:
        b = first + s * step
        width = T.Bind(T.min(share - s * step, step))
        is_listed = T.Bind(count[m] < most)
        listed = T.if_then_else(is_listed, count[m], k)
        walk_row(walk, sums, 0, total, w, q, index, m, 0, T.Bind(listed), is_listed, b, width)
        with T.serial(width) as i:
            finish(output, walk, sums, i, total[0], m, b + i)


def kernel(n: int, k: int, walk: Walk, tiles: Tiles, most_eighths: int) -> PrimFunc:
    """Where `most_eighths` of K are active, a row walks every column."""
    end = EPILOGUES["residual"]
    blocks, most = -(-n // walk.block), -(-k * most_eighths // 8)
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def sparse_ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        index: T.Buffer((rows, k), "int32"),
        count: T.Buffer((rows,), "int32"),
        w: T.Buffer((k, blocks, walk.block // 4), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        height = T.meta_var(T.cast(rows, "int32"))
        with T.sblock("root"):
            if rows == 1:
                sums = T.alloc_buffer((MAX_TASKS * blocks, walk.block), "int32")
                totals = T.alloc_buffer((MAX_TASKS, LANES), "int32")  # a line each
                is_listed = count[0] < most
                listed = T.if_then_else(count[0] < most, count[0], k)
                groups = T.ceildiv(listed, walk.group)
                tasks = T.min(threads.count(), MAX_TASKS)
                for task in T.parallel(tasks):
                    first = threads.share(groups, task, tasks) * walk.group
                    last = T.min(threads.share(groups, task + 1, tasks) * walk.group, listed)
                    total = T.alloc_buffer((1,), "int32")
                    walk_row(
                        walk, sums, task * blocks, total, w, q, index,
                        0, first, last - first, is_listed, 0, blocks,
                    )  # fmt: skip
                    totals[task, 0] = total[0]
                for task in T.serial(tasks - 1):
                    totals[0, 0] += totals[task + 1, 0]
                for task in T.parallel(tasks):
                    first = threads.share(blocks, task, tasks)
                    last = threads.share(blocks, task + 1, tasks)
                    finish_shares(output, walk, sums, totals, tasks, first, last)
            else:
                tasks = T.min(threads.count(), blocks)
                active = T.int64(0)
                for m in T.serial(height):
                    active += T.cast(count[m], "int64")
                for task in T.parallel(tasks):
                    first = threads.share(blocks, task, tasks)
                    share = threads.share(blocks, task + 1, tasks) - first
                    if tiles.pays(height, active):
                        tiles.multiply(output, q, w, height, first, share)
                    else:
                        walk_rows(
                            output, walk, tiles, q, w, index, count, height, most, first, share
                        )

    return end.finish(sparse_ternary_matmul)
