"""What a prompt's attention on Hopper reads: a packed cache's blocks, unpacked once for all tiles.

    for slot, kv_head, b in S, Hkv, T/64:           blockIdx
        last = largest position of the slot's rows  blocks beyond it are left out
        k[64, D], v[D, 64] = levels(b)              shared; unpack_cuda.py
        levels[slot, kv_head, b] = k, v, scales     as a tile wants them in its shared memory

A prompt of 2048 tokens would else unpack each block for up to 128 tiles. One layer's levels take 10
bits, padding and scales with them, where every layer's cache has 3: a ninth of it at 30 layers.
"""

from dataclasses import replace

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.prompt_cuda import copy_packed, load_scale, raw_bytes
from schedules.attention.prompt_tile_cuda import SMALLEST_SHARED, VALUE_PITCH, Arrays, Form
from schedules.attention.softmax_cuda import KEYS, Softmax
from schedules.attention.unpack_cuda import unpack_bos, unpack_keys, unpack_values
from schedules.intrin import cuda


def blocks_of(arrays: Arrays) -> Expr:
    """Of 64 positions, of a slot."""
    return T.ceildiv(arrays.scales.shape[3], KEYS)


def size(form: Form, arrays: Arrays) -> Expr:
    return arrays.codes.shape[0] * form.num_kv_heads * blocks_of(arrays) * form.block_bytes


def first_byte(form: Form, arrays: Arrays, where: tuple, b: Expr) -> Expr:
    slot, kv_head = where
    return ((slot * form.num_kv_heads + kv_head) * blocks_of(arrays) + b) * form.block_bytes


def launch(form: Form, arrays: Arrays, levels) -> None:
    form = replace(form, warps=8)  # as unpack_values wants
    with cuda.blocks(blocks_of(arrays)) as b, cuda.blocks(form.num_kv_heads, "y") as kv_head:
        with cuda.blocks(arrays.codes.shape[0], "z") as slot, cuda.threads(form.threads) as t:
            shared = cuda.shared_bytes(max(form.block_bytes + raw_bytes(form), SMALLEST_SHARED))
            seen = seen_positions(form, arrays, slot, t)
            with cuda.when(b * KEYS < seen):
                unpack(form, arrays, (slot, kv_head), T.cast(b, "int32"), seen - 1, shared, t)
                cuda.sync()
                first = T.bind(first_byte(form, arrays, (slot, kv_head), b))
                write(form, shared, levels, first, t)


def seen_positions(form: Form, arrays: Arrays, slot: Expr, t: Expr) -> Expr:
    """One more than the largest position of the slot's rows; 0 where it has none."""
    seen = cuda.local("int32", 1)
    cuda.store(seen, T.int32(0), 0)
    with T.serial(T.ceildiv(arrays.rows, form.threads)) as step:
        m = T.bind(T.min(step * form.threads + t, arrays.rows - 1))
        position = T.Select(arrays.slots[m] == slot, arrays.positions[m] + 1, T.int64(0))
        cuda.store(seen, T.max(seen[0], T.cast(position, "int32")), 0)
    return cuda.Scratch(t, form.threads).reduce(seen[0], "max")


def unpack(
    form: Form, arrays: Arrays, where: tuple, b: Expr, last: Expr, shared: Expr, t: Expr
) -> None:
    """A block at `shared`, what it comes from behind it."""
    packed, raw = form.packed, T.bind(shared + T.uint32(form.block_bytes))
    copy_packed(form, arrays.codes, where, b, raw, t)
    cuda.commit_copies()
    scale = load_scale(arrays.scales, where, b, last, t)
    cuda.wait_for_copies()
    cuda.sync()
    values = T.bind(shared + T.uint32(form.key_bytes))
    unpack_keys(packed, raw, shared, form.pitch, t, form.threads)
    unpack_values(packed, raw + T.uint32(packed.block_bytes), values, VALUE_PITCH, t)
    with cuda.when(t < 2 * KEYS):
        Softmax.store_scale(T.bind(shared + T.uint32(form.level_bytes)), t, scale)
    if form.bits == 3:
        cuda.sync()
        with cuda.when(b == 0):
            unpack_bos(form.dim, arrays.words, where, shared, values, VALUE_PITCH, t)


def write(form: Form, shared: Expr, levels, first: Expr, t: Expr) -> None:
    words = cuda.local("uint32", 4)
    four = [words[i] for i in range(4)]
    with cuda.strided(form.block_bytes // 16, t, form.threads) as i:
        cuda.ptx("ld.shared.v4.b32", *four, shared + T.cast(i * 16, "uint32"))
        cuda.ptx("st.global.v4.b32", T.address_of(levels[first + i * 16]), *four)
