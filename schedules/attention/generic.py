"""attention on any CPU: online softmax over blocks of the packed cache, each unpacked once for a
tile of query rows and all heads of a group.

    for h, tile in Hkv, M/R:                 parallel; heads outside, as later tiles see more
        for run of rows of one slot in tile:     one run in a prefill, one a row in decode
            q8 = quantize(q)                     for a quantised cache; float64 at 16 bits
            for t0 in seen/B:
                block = keys t0 : t0+B           unpacked, B * D int16 in L1
                dots = q8 . block                2 queries * 4 keys of int32 accumulators
                peak, p, unit, total = softmax step  vectors of keys, float64
                block = values t0 : t0+B
                o = o * rescale + (p . block) * unit   2 queries * V vectors of int32 accumulators
            y = o / total                        float64, rounded once

    tile | value          | bound by
    B    | 64             | the definition: the positions that share a unit; 16 KiB at D = 128
    R    | 32 / group     | 32 queries a block: unpacking is a tenth of their multiply-adds
    V    | divides D/lanes| 2 V accumulators and V loads in 16 registers

Integers and float64 make the result the same to the last bit whatever the order, which a4.8 needs
(docs/architecture.md, "Attention"). Scores carry the key's scale and weights the value's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.attention.products import QUERY_TILE, multiply_keys, multiply_values
from schedules.attention.softmax import State, softmax_step
from schedules.attention.unpack import unpacker
from schedules.intrin.vector import each, fill, fold, store
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale
from schedules.targets import CpuTarget

KEYS = 64  # of a block
QUERIES = 32  # that one unpacked block serves


@dataclass(frozen=True)
class Products:
    """The two products with a block, as products.py defines them, and what they read."""

    factor_dtype: str
    sum_dtype: str
    lanes: int  # columns of scratch are a multiple of
    query_tile: int  # queries at once; those left are taken one by one
    multiply_keys: Callable
    multiply_values: Callable


def plain_products(kv_bits: int, target: CpuTarget) -> Products:
    factor_dtype, sum_dtype = ("float64", "float64") if kv_bits == 16 else ("int16", "int32")
    lanes = target.lanes(64 if kv_bits == 16 else 32)
    return Products(
        factor_dtype, sum_dtype, lanes, QUERY_TILE,
        partial(multiply_keys, lanes=lanes), partial(multiply_values, lanes=lanes),
    )  # fmt: skip


def kernel(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_bits: int,
    target: CpuTarget,
    products: Products | None = None,
) -> PrimFunc:
    products = products or plain_products(kv_bits, target)
    group = num_heads // num_kv_heads
    tile_rows = max(1, QUERIES // group)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    code_dtype = "float16" if kv_bits == 16 else "uint8"
    attend_tile = _tile(group, tile_rows, head_dim, kv_bits, target, products)

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
        codes = T.match_buffer(codes_, (num_slots, num_kv_heads, 2, size), code_dtype)
        scales = T.match_buffer(scales_, (num_slots, num_kv_heads, 2, scale_size), "float16")
        slots = T.match_buffer(slots_, (rows,), "int64")
        positions = T.match_buffer(positions_, (rows,), "int64")
        y = T.match_buffer(y_, (rows, num_heads * head_dim), "float32")
        with T.sblock("root"):
            for task in T.parallel(num_kv_heads * T.ceildiv(rows, tile_rows)):
                head: T.let = task // T.ceildiv(rows, tile_rows)
                first: T.let = task % T.ceildiv(rows, tile_rows) * tile_rows
                last: T.let = T.min(first + tile_rows, rows)
                attend_tile(qkv, codes, scales, slots, positions, y, head, first, last)

    return attention


def _tile(
    group: int,
    tile_rows: int,
    head_dim: int,
    kv_bits: int,
    target: CpuTarget,
    products: Products,
):
    """attend_tile(..., head, first, last): rows first..last, run by run of one slot."""
    factor_dtype, sum_dtype = products.factor_dtype, products.sum_dtype
    lanes = products.lanes
    padded = math.ceil(head_dim / lanes) * lanes  # columns of scratch; those past D stay zero
    queries = tile_rows * group
    begin_query, finish_query = query_ends(head_dim, padded, kv_bits, target)
    attend_block = _block(group, head_dim, kv_bits, target, products)

    @T.inline
    def attend_tile(qkv, codes, scales, slots, positions, y, head, first, last):
        q = T.alloc_buffer((queries, padded), factor_dtype)
        o = T.alloc_buffer((queries, padded), "float64")
        block = T.alloc_buffer((KEYS, padded), factor_dtype)
        key_scale = T.alloc_buffer((KEYS,), "float64")
        value_scale = T.alloc_buffer((KEYS,), "float64")
        p = T.alloc_buffer((queries, KEYS), sum_dtype)
        factor = T.alloc_buffer((queries,), "float64")
        peak = T.alloc_buffer((queries,), "float64")
        total = T.alloc_buffer((queries,), "float64")
        rescale = T.alloc_buffer((queries,), "float64")
        unit = T.alloc_buffer((queries,), "float64")
        run = T.alloc_buffer((2,), "int64")  # rows run[0] : run[1] have one slot

        for j, i in T.grid(KEYS, padded):
            block[j, i] = tirx.const(0, factor_dtype)
        run[0] = first
        while run[0] < last:
            run[1] = run[0] + 1
            while run[1] < last and slots[T.min(run[1], last - 1)] == slots[run[0]]:
                run[1] = run[1] + 1
            slot: T.let = slots[run[0]]
            seen: T.let = positions[run[1] - 1] + 1
            for r, g in T.grid(run[1] - run[0], group):
                begin_query(
                    qkv, q, o, State(factor, peak, total, rescale, unit),
                    run[0] + r, head * group + g, r * group + g,
                )  # fmt: skip
            for b in T.serial(T.ceildiv(seen, KEYS)):
                attend_block(
                    codes, scales, positions, q, o, p, block, key_scale, value_scale,
                    State(factor, peak, total, rescale, unit), slot, head, run, b * KEYS,
                    T.cast(T.min(seen - b * KEYS, T.int64(KEYS)), "int32"),
                )  # fmt: skip
            for r, g in T.grid(run[1] - run[0], group):
                finish_query(o, total, y, run[0] + r, head * group + g, r * group + g)
            run[0] = run[1]

    return attend_tile


def query_ends(head_dim: int, padded: int, kv_bits: int, target: CpuTarget):
    """Query i of the tile into scratch, INT8 for a quantised cache; and its result out of it."""
    lanes = target.lanes(32)
    root = T.float64(head_dim**-0.5)

    def begin_query(qkv, q, o, state, m, head, i):
        def value(d):
            return qkv[m, head * head_dim + d]

        if kv_bits == 16:
            each(head_dim, lanes, lambda d, _: store(q, (i, d), T.cast(value(d), "float64")))
            store(state.factor, (i,), root)
        else:
            peaks = T.alloc_buffer((lanes,), "float32", scope="local")
            fill(lanes, peaks, T.float32(SMALLEST_STAT))
            each(
                head_dim, lanes,
                lambda d, lane: store(peaks, (lane,), T.max(peaks[lane], T.abs(value(d)))),
            )  # fmt: skip
            fold(lanes, peaks, T.max)
            scale = T.bind(int8_factor(peaks[0]))
            each(
                head_dim, lanes,
                lambda d, _: store(q, (i, d), T.cast(int8_code(value(d), scale), q.dtype)),
            )  # fmt: skip
            store(state.factor, (i,), T.cast(int8_scale(peaks[0]), "float64") * root)
        zero = tirx.const(0, q.dtype)
        each(padded, lanes, lambda d, _: store(q, (i, d), zero), start=head_dim)
        each(padded, lanes, lambda d, _: store(o, (i, d), T.float64(0)))
        store(state.peak, (i,), T.min_value("float64"))
        store(state.total, (i,), T.float64(0))

    def finish_query(o, total, y, m, head, i):
        def divide(d, lane):
            store(y, (m, head * head_dim + d), T.cast(o[i, d] / total[i], "float32"))

        each(head_dim, lanes, divide)

    return begin_query, finish_query


def _block(group: int, head_dim: int, kv_bits: int, target: CpuTarget, products: Products):
    """attend_block(..., start, count): keys start : start + count of the run's slot."""
    query_tile = products.query_tile
    unpack_row = unpacker(kv_bits, head_dim, target)

    def load(codes, scales, slot, head, kv, start, count, block, block_scale):
        with T.serial(count) as j:
            unpack_row(codes, slot, head, kv, start + j, block, j)
            if kv_bits == 16:
                scale = T.float64(1)
            else:
                scale = T.cast(T.cast(scales[slot, head, kv, start + j], "float32"), "float64")
            store(block_scale, (j,), scale)

    def for_query_tiles(queries, body):
        with T.serial(queries // query_tile) as i:
            body(i * query_tile, query_tile)
        if group % query_tile:
            with T.serial(queries % query_tile) as i:
                body(queries // query_tile * query_tile + i, 1)

    def attend_block(
        codes, scales, positions, q, o, p, block, key_scale, value_scale,
        state, slot, head, run, start, count,
    ):  # fmt: skip
        queries = T.bind(T.cast(run[1] - run[0], "int32") * group)

        def keys(first, tile):
            products.multiply_keys(q, block, p, first, tile, count)

        def values(first, tile):
            products.multiply_values(p, block, state, o, first, tile, count)

        load(codes, scales, slot, head, 0, start, count, block, key_scale)
        for_query_tiles(queries, keys)
        load(codes, scales, slot, head, 1, start, count, block, value_scale)
        with T.serial(queries) as i:
            seen = positions[run[0] + i // group] + 1 - start
            softmax_step(p, key_scale, value_scale, state, i, seen, KEYS, target.lanes(64))
        for_query_tiles(queries, values)

    return attend_block
