"""attention on any CPU: online softmax over blocks of the packed cache, each unpacked once for a
tile of query rows and all heads of a group.

    for h, tile in Hkv, M/R:                 parallel; heads outside, as later tiles see more
        for run of rows of one slot in tile:     one run in a prefill, one a row in decode
            for t0 in seen/B:
                block = keys t0 : t0+B           unpacked, B * D floats in L1
                p = q . block                    2 queries * 4 keys of accumulators
                peak, p, total = softmax step    vectors of keys
                block = values t0 : t0+B
                o = o * rescale + p . block      2 queries * V vectors of accumulators
            y = o / total

    tile | value          | bound by
    B    | 32             | B * D floats are 16 KiB at D = 128: half of L1
    R    | 32 / group     | 32 queries a block: unpacking is a tenth of their multiply-adds
    V    | divides D/lanes| 2 V accumulators and V loads in 16 registers

Scores carry the key's scale and probabilities the value's, so codes are unpacked as small integers.
Measured: not yet.
"""

import math

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.attention.products import QUERY_TILE, key_product, value_product
from schedules.attention.softmax import PEAK, RESCALE, TOTAL, softmax_step
from schedules.attention.unpack import unpacker
from schedules.intrin.vector import each, store
from schedules.targets import TargetSpec

KEYS = 32  # of a block
QUERIES = 32  # that one unpacked block serves


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: TargetSpec
) -> PrimFunc:
    group = num_heads // num_kv_heads
    tile_rows = max(1, QUERIES // group)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    code_dtype = "float16" if kv_bits == 16 else "uint8"
    attend_tile = _tile(group, tile_rows, head_dim, kv_bits, target)

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


def _tile(group: int, tile_rows: int, head_dim: int, kv_bits: int, target: TargetSpec):
    """attend_tile(..., head, first, last): rows first..last, run by run of one slot."""
    lanes = target.lanes(32)
    padded = math.ceil(head_dim / lanes) * lanes  # columns of scratch; those past D stay zero
    queries = tile_rows * group
    begin_run, finish_run = _run_ends(group, head_dim, padded, lanes)
    attend_block = _block(group, head_dim, padded, kv_bits, target)

    @T.inline
    def attend_tile(qkv, codes, scales, slots, positions, y, head, first, last):
        q = T.alloc_buffer((queries, padded), "float32")
        o = T.alloc_buffer((queries, padded), "float32")
        block = T.alloc_buffer((KEYS, padded), "float32")
        block_scale = T.alloc_buffer((2, KEYS), "float32")
        p = T.alloc_buffer((queries, KEYS), "float32")
        state = T.alloc_buffer((3, queries), "float32")  # peak, total, rescale
        run = T.alloc_buffer((2,), "int64")  # rows run[0] : run[1] have one slot

        for j, i in T.grid(KEYS, padded):
            block[j, i] = T.float32(0)
        run[0] = first
        while run[0] < last:
            run[1] = run[0] + 1
            while run[1] < last and slots[T.min(run[1], last - 1)] == slots[run[0]]:
                run[1] = run[1] + 1
            begin_run(qkv, q, o, state, head, run)
            seen: T.let = positions[run[1] - 1] + 1
            for b in T.serial(T.ceildiv(seen, KEYS)):
                attend_block(
                    codes, scales, slots, positions, q, o, block, block_scale, p, state, head, run,
                    b * KEYS, T.cast(T.min(seen - b * KEYS, T.int64(KEYS)), "int32"),
                )  # fmt: skip
            finish_run(o, state, y, head, run)
            run[0] = run[1]

    return attend_tile


def _run_ends(group: int, head_dim: int, padded: int, lanes: int):
    """Queries of a run, times 1/sqrt(D), into scratch; and their results out of it."""
    factor = head_dim**-0.5

    def begin_query(qkv, q, o, state, m, head, i):
        def load(d, lane):
            store(q, (i, d), qkv[m, head * head_dim + d] * T.float32(factor))

        each(head_dim, lanes, load)
        each(padded, lanes, lambda d, lane: store(q, (i, d), T.float32(0)), start=head_dim)
        each(padded, lanes, lambda d, lane: store(o, (i, d), T.float32(0)))
        store(state, (PEAK, i), T.min_value("float32"))
        store(state, (TOTAL, i), T.float32(0))

    def finish_query(o, state, y, m, head, i):
        def divide(d, lane):
            store(y, (m, head * head_dim + d), o[i, d] / state[TOTAL, i])

        each(head_dim, lanes, divide)

    @T.inline
    def begin_run(qkv, q, o, state, head, run):
        for r, g in T.grid(run[1] - run[0], group):
            begin_query(qkv, q, o, state, run[0] + r, head * group + g, r * group + g)

    @T.inline
    def finish_run(o, state, y, head, run):
        for r, g in T.grid(run[1] - run[0], group):
            finish_query(o, state, y, run[0] + r, head * group + g, r * group + g)

    return begin_run, finish_run


def _block(group: int, head_dim: int, padded: int, kv_bits: int, target: TargetSpec):
    """attend_block(..., start, count): keys start : start + count of the run's slot."""
    lanes = target.lanes(32)
    unpack_row = unpacker(kv_bits, head_dim, target)
    multiply_keys = key_product(padded, lanes)
    multiply_values = value_product(padded, lanes, RESCALE)

    def load_scale(scales, slot, head, kv, position):
        if kv_bits == 16:
            return T.float32(1)
        return T.cast(scales[slot, head, kv, position], "float32")

    @T.inline
    def load(codes, scales, slot, head, kv, start, count, block, block_scale):
        for j in T.serial(count):
            unpack_row(codes, slot, head, kv, start + j, block, j)
            block_scale[kv, j] = load_scale(scales, slot, head, kv, start + j)

    @T.inline
    def for_query_tiles(count, body):
        for i in T.serial(count // QUERY_TILE):
            body(i * QUERY_TILE, QUERY_TILE)
        if group % QUERY_TILE != 0:
            if count % QUERY_TILE != 0:
                body(count - 1, 1)

    @T.inline
    def attend_block(
        codes, scales, slots, positions, q, o, block, block_scale, p, state, head, run, start, count
    ):
        queries: T.let = T.cast(run[1] - run[0], "int32") * group

        @T.inline
        def keys(first, tile):
            multiply_keys(q, block, p, first, tile, count)

        @T.inline
        def values(first, tile):
            multiply_values(p, block, state, o, first, tile, count)

        load(codes, scales, slots[run[0]], head, 0, start, count, block, block_scale)
        for_query_tiles(queries, keys)
        load(codes, scales, slots[run[0]], head, 1, start, count, block, block_scale)
        for i in T.serial(queries):
            seen: T.let = positions[run[0] + i // group] + 1 - start
            softmax_step(p, block_scale, state, i, seen, KEYS, lanes)
        for_query_tiles(queries, values)

    return attend_block
