"""attention on x86: a quantised cache multiplied in bytes; few rows split by their positions.

    for h, tile, chunk in Hkv, M/R, C:       parallel; the blocks of a run are cut into C shares
        for run of rows of one slot in tile:
            q8 = quantize(q)                     int8, and 7 sum(q8)
            for t0 in share of seen/B:
                block = keys t0 : t0+B           unpacked, B * D bytes in L1, level + 7
                dots = q8 . block                queries * keys of accumulators
                peak, p, unit, total = softmax step  vectors of keys, float64
                block = values t0 : t0+B         signed
                o = o * rescale + (p . block) * unit   queries * columns of accumulators
            C = 1: y = o / total                 else peak, total and o to the workspace
    for m, h in M, Hq:                       parallel, where C > 1
        y = sum of o e^(peak - max peak) over that of total

    tile | value          | bound by
    B    | 64             | the definition: the positions that share a unit; 8 KiB at D = 128
    R    | 32 / group     | 32 queries a block: unpacking is a tenth of their multiply-adds
    C    | threads        | five KV heads balance on any number of threads; 1 where Hkv * M/R is
         |                | THREAD_TASKS a thread or more

What a register does: `ByteProducts`, of products_avx2.py and products_avx512.py. 16 bits: generic's
kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.attention import generic
from schedules.attention.generic import KEYS, QUERIES, query_ends
from schedules.attention.softmax import State, softmax_step
from schedules.intrin import avx2, threads
from schedules.intrin.exp import exp
from schedules.targets import CpuTarget

THREAD_TASKS = 4  # tasks a thread that leave no thread idle for long
MAX_CHUNKS = 16  # shares that the workspace has room for
PEAK, TOTAL = 0, 1  # of a share, in the workspace


@dataclass(frozen=True)
class ByteProducts:
    """What an instruction set does with a block; the functions are those of products_avx2.py."""

    lanes: int  # columns of scratch are a multiple of
    scores: int  # that a softmax step takes at once: two registers share the constants of exp
    key_queries: int  # queries at once; those left are taken one by one
    value_queries: int
    weights: tuple[int, str]  # of a query's weights for a block, as multiply_values reads them
    unpacker: Callable  # (kv_bits, head_dim, target) -> row, as unpack.py's
    write_offset: Callable
    multiply_keys: Callable
    pack_weights: Callable
    multiply_values: Callable


def kernel(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_bits: int,
    target: CpuTarget,
    products: ByteProducts,
) -> PrimFunc:
    if kv_bits == 16:
        return generic.kernel(num_heads, num_kv_heads, head_dim, kv_bits, target)
    group = num_heads // num_kv_heads
    tile_rows = max(1, QUERIES // group)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    padded = math.ceil(head_dim / products.lanes) * products.lanes
    attend_tile = _tile(group, tile_rows, head_dim, kv_bits, target, products)
    merge = _merge(num_heads, head_dim, padded)

    def parts(rows):  # rows of the workspace
        return T.Select(rows <= tile_rows, rows * (num_heads * MAX_CHUNKS), T.int64(1))

    @T.prim_func(s_tir=True)
    def attention(
        qkv_: T.handle,
        codes_: T.handle,
        scales_: T.handle,
        slots_: T.handle,
        positions_: T.handle,
        y_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        num_slots = T.int64()
        size = T.int64()
        scale_size = T.int64()
        qkv = T.match_buffer(qkv_, (rows, width), "float32")
        codes = T.match_buffer(codes_, (num_slots, num_kv_heads, 2, size), "uint8")
        scales = T.match_buffer(scales_, (num_slots, num_kv_heads, 2, scale_size), "float16")
        slots = T.match_buffer(slots_, (rows,), "int64")
        positions = T.match_buffer(positions_, (rows,), "int64")
        y = T.match_buffer(y_, (rows, num_heads * head_dim), "float32")
        with T.sblock("root"):
            part_o = T.alloc_buffer((parts(rows), padded), "float64")
            part_state = T.alloc_buffer((parts(rows), 2), "float64")
            tiles: T.let = T.ceildiv(rows, tile_rows)
            chunks: T.let = num_chunks(tiles, num_kv_heads)
            for task in T.parallel(num_kv_heads * tiles * chunks):
                head: T.let = task // (tiles * chunks)
                first: T.let = task // chunks % tiles * tile_rows
                last: T.let = T.min(first + tile_rows, rows)
                attend_tile(
                    qkv, codes, scales, slots, positions, y, part_o, part_state,
                    head, first, last, task % chunks, chunks,
                )  # fmt: skip
            if chunks > 1:
                for i in T.parallel(rows * num_heads):
                    merge(part_o, part_state, y, i, chunks)

    return attention


def num_chunks(tiles, num_kv_heads: int):
    """Shares that a tile's positions are cut into: one unless it is the only tile."""
    workers = T.cast(T.min(threads.count(), MAX_CHUNKS), "int64")
    is_split = T.And(tiles == 1, num_kv_heads < THREAD_TASKS * workers)
    return T.Select(is_split, workers, T.int64(1))


def _tile(
    group: int,
    tile_rows: int,
    head_dim: int,
    kv_bits: int,
    target: CpuTarget,
    products: ByteProducts,
):
    """attend_tile(..., head, first, last, chunk, chunks): a share of the positions of rows
    first..last, run by run of one slot."""
    lanes = products.lanes
    padded = math.ceil(head_dim / lanes) * lanes  # columns of scratch; q past D is zero
    queries = tile_rows * group
    begin_query, finish_query = query_ends(head_dim, padded, kv_bits, target)
    attend_block = _block(group, head_dim, kv_bits, target, products)

    @T.inline
    def attend_tile(
        qkv, codes, scales, slots, positions, y, part_o, part_state,
        head, first, last, chunk, chunks,
    ):  # fmt: skip
        q = T.alloc_buffer((queries, padded), "int8")
        offset = T.alloc_buffer((queries,), "int32")
        o = T.alloc_buffer((queries, padded), "float64")
        keys = T.alloc_buffer((KEYS, padded), "uint8")
        values = T.alloc_buffer((KEYS, padded), "int8")
        key_scale = T.alloc_buffer((KEYS,), "float64")
        value_scale = T.alloc_buffer((KEYS,), "float64")
        p = T.alloc_buffer((queries, KEYS), "int32")
        weights = T.alloc_buffer((queries, products.weights[0]), products.weights[1])
        factor = T.alloc_buffer((queries,), "float64")
        peak = T.alloc_buffer((queries,), "float64")
        total = T.alloc_buffer((queries,), "float64")
        rescale = T.alloc_buffer((queries,), "float64")
        unit = T.alloc_buffer((queries,), "float64")
        run = T.alloc_buffer((2,), "int64")  # rows run[0] : run[1] have one slot
        state = T.meta_var(State(factor, peak, total, rescale, unit))

        run[0] = first
        while run[0] < last:
            run[1] = run[0] + 1
            while run[1] < last and slots[T.min(run[1], last - 1)] == slots[run[0]]:
                run[1] = run[1] + 1
            seen: T.let = positions[run[1] - 1] + 1
            for r, g in T.grid(run[1] - run[0], group):
                begin_query(qkv, q, o, state, run[0] + r, head * group + g, r * group + g)
                products.write_offset(offset, q, r * group + g)
            begin: T.let = threads.share(T.ceildiv(seen, KEYS), chunk, chunks)
            end: T.let = threads.share(T.ceildiv(seen, KEYS), chunk + 1, chunks)
            for b0 in T.serial(end - begin):
                attend_block(
                    codes, scales, positions, q, offset, o, p, weights, keys, values, key_scale,
                    value_scale, state, slots[run[0]], head, run, (begin + b0) * KEYS,
                    T.cast(T.min(seen - (begin + b0) * KEYS, T.int64(KEYS)), "int32"),
                )  # fmt: skip
            for r, g in T.grid(run[1] - run[0], group):
                if chunks > 1:
                    to: T.let = (run[0] + r) * (y.shape[1] // head_dim) + head * group + g
                    _keep(part_o, part_state, to * chunks + chunk, o, state, r * group + g)
                else:
                    finish_query(o, total, y, run[0] + r, head * group + g, r * group + g)
            run[0] = run[1]

    return attend_tile


def _keep(part_o, part_state, part, o, state: State, i) -> None:
    """The share's results of query i into the workspace."""
    T.buffer_store(part_state, state.peak[i], [part, PEAK])
    T.buffer_store(part_state, state.total[i], [part, TOTAL])
    with T.serial(int(o.shape[1]) // 4) as d:
        avx2.store(part_o, part, 4 * d, value=avx2.load(o, i, 4 * d, lanes=4), lanes=4)


def _merge(num_heads: int, head_dim: int, padded: int):
    """merge(part_o, part_state, y, i, chunks): query i of M * Hq from its shares. One without a
    position has the lowest peak and a total of zero."""

    @T.inline
    def merge(part_o, part_state, y, i, chunks):
        o = T.alloc_buffer((padded,), "float64")
        sums = T.alloc_buffer((2,), "float64")
        sums[PEAK] = T.min_value("float64")
        sums[TOTAL] = T.float64(0)
        for d in T.serial(padded // 4):
            avx2.store(o, 4 * d, value=T.broadcast(T.float64(0), 4), lanes=4)
        for c in T.serial(chunks):
            sums[PEAK] = T.max(sums[PEAK], part_state[i * chunks + c, PEAK])
        for c in T.serial(chunks):
            weight = T.meta_var(T.bind(exp(part_state[i * chunks + c, PEAK] - sums[PEAK])))
            sums[TOTAL] = sums[TOTAL] + part_state[i * chunks + c, TOTAL] * weight
            for d in T.serial(padded // 4):
                part = T.meta_var(avx2.load(part_o, i * chunks + c, 4 * d, lanes=4))
                avx2.add(o, 4 * d, value=part * T.broadcast(weight, 4), lanes=4)
        for d in T.serial(head_dim):
            column: T.let = i % num_heads * head_dim + d
            y[i // num_heads, column] = T.cast(o[d] / sums[TOTAL], "float32")

    return merge


def _block(group: int, head_dim: int, kv_bits: int, target: CpuTarget, products: ByteProducts):
    """attend_block(..., start, count): keys start : start + count of the run's slot."""
    unpack_row = products.unpacker(kv_bits, head_dim, target)

    def load(codes, scales, slot, head, kv, start, count, block, block_scale):
        def scale(j, lanes):
            half = avx2.load(scales, slot, head, kv, start + j, lanes=lanes)
            value = T.cast(T.cast(half, avx2.like("float32", lanes)), avx2.like("float64", lanes))
            avx2.store(block_scale, j, value=value, lanes=lanes)

        with T.serial(count) as j:
            unpack_row(codes, slot, head, kv, start + j, block, j)
        with T.serial(count // 4) as j:
            scale(4 * j, 4)
        with T.serial(count % 4) as j:
            scale(count // 4 * 4 + j, 1)

    def for_query_tiles(queries, tile, body):
        with T.serial(queries // tile) as i:
            body(i * tile, tile)
        if group % tile:
            with T.serial(queries % tile) as i:
                body(queries // tile * tile + i, 1)

    def attend_block(
        codes, scales, positions, q, offset, o, p, weights, keys, values, key_scale,
        value_scale, state, slot, head, run, start, count,
    ):  # fmt: skip
        queries = T.bind(T.cast(run[1] - run[0], "int32") * group)

        def key_tile(first, tile):
            products.multiply_keys(q, offset, keys, p, first, tile, count)

        def value_tile(first, tile):
            products.multiply_values(weights, values, state, o, first, tile, count, kv_bits)

        load(codes, scales, slot, head, 0, start, count, keys, key_scale)
        for_query_tiles(queries, products.key_queries, key_tile)
        load(codes, scales, slot, head, 1, start, count, values, value_scale)
        with T.serial(queries) as i:
            seen = positions[run[0] + i // group] + 1 - start
            softmax_step(p, key_scale, value_scale, state, i, seen, KEYS, products.scores)
            products.pack_weights(weights, p, i)
        for_query_tiles(queries, products.value_queries, value_tile)

    return attend_block
