"""kv_append on CUDA: a warp a head, a lane every 32nd column; the packed row is put together in
shared memory.

    for m, h, kv in M, Hkv, 2:           blockIdx.x; 32 threads
        amax = max |x|                   warp shuffles
        scale = float16(amax / qmax), in 2^-14 .. 65504
        code[D] = rint(x / scale) + qmax shared
        codes[slot, h, kv, row] = planes of code, a byte a lane

A step's rows of a slot stand at different positions, so no two blocks write the same bytes.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.kv_append.generic import (
    BOS_BITS,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    gathered,
    quantized,
)
from schedules.targets import GpuTarget


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: GpuTarget
) -> PrimFunc:
    width = (num_heads + 2 * num_kv_heads) * head_dim
    code_dtype = "float16" if kv_bits == 16 else "uint8"
    write = {16: _halves, 4: _nibbles, 3: _planes}[kv_bits]
    rows, num_slots = Var("M", "int64"), Var("num_slots", "int64")
    size, scale_size = Var("size", "int64"), Var("scale_size", "int64")

    def append_head(codes, scales, qkv, slots, positions, block, t):
        m, head = T.bind(block // (2 * num_kv_heads)), T.bind(block % (2 * num_kv_heads))
        kv, h = T.bind(head // num_kv_heads), T.bind(head % num_kv_heads)
        start = T.bind((num_heads + head) * head_dim)
        where = (slots[m], h, kv)
        write(codes, scales, lambda d: qkv[m, start + d], where, positions[m], head_dim, t)

    @T.prim_func(s_tir=True)
    def kv_append(
        codes: T.Buffer((num_slots, num_kv_heads, 2, size), code_dtype),
        scales: T.Buffer((num_slots, num_kv_heads, 2, scale_size), "float16"),
        qkv: T.Buffer((rows, width), "float32"),
        slots: T.Buffer((rows,), "int64"),
        positions: T.Buffer((rows,), "int64"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows * (2 * num_kv_heads)) as block:
                    with cuda.threads(cuda.WARP) as t:
                        append_head(codes, scales, qkv, slots, positions, block, t)

    return kv_append


def _halves(codes, scales, value, where, position, head_dim: int, t) -> None:
    with cuda.strided(head_dim, t, cuda.WARP) as d:
        cuda.store(codes, T.cast(value(d), "float16"), *where, position * head_dim + d)


def head_scale(amax: Expr, qmax: Expr) -> Expr:
    """float32 of the float16 that the cache keeps"""
    ratio = T.min(amax / qmax, T.float32(LARGEST_SCALE))
    half = T.cast(T.cast(ratio, "float16"), "float32")
    return T.max(half, T.float32(SMALLEST_SCALE))


def _quantize(code, scales, value, where, position, head_dim: int, bits: int, t) -> None:
    """code[:D] and the scale of a head's row."""
    qmax = 2 ** (bits - 1) - 1
    peak = cuda.local("float32", 1)
    cuda.store(peak, T.float32(0), 0)
    with cuda.strided(head_dim, t, cuda.WARP) as d:
        cuda.store(peak, T.max(peak[0], T.abs(value(d))), 0)
    amax = cuda.warp_reduce(peak[0], "max")
    scale = T.bind(head_scale(amax, T.float32(qmax)))
    with cuda.when(t == 0):
        cuda.store(scales, T.cast(scale, "float16"), *where, position)
    with cuda.strided(head_dim, t, cuda.WARP) as d:
        cuda.store(code, quantized(value(d) / scale, qmax), d)
    cuda.sync()


def _store_nibbles(code, codes, where, base, head_dim: int, t) -> None:
    with cuda.strided(head_dim // 2, t, cuda.WARP) as i:
        cuda.store(codes, gathered(code, head_dim, 2, i, lambda c: c), *where, base + i)


def _store_planes(code, codes, where, base, head_dim: int, t) -> None:
    with cuda.strided(head_dim // 4, t, cuda.WARP) as i:
        low = gathered(code, head_dim, 4, i, lambda c: c & T.uint8(3))
        cuda.store(codes, low, *where, base + i)
    with cuda.strided(head_dim // 8, t, cuda.WARP) as i:
        high = gathered(code, head_dim, 8, i, lambda c: c >> T.uint8(2))
        cuda.store(codes, high, *where, base + head_dim // 4 + i)


def _nibbles(codes, scales, value, where, position, head_dim: int, t) -> None:
    code = cuda.shared("uint8", head_dim)
    _quantize(code, scales, value, where, position, head_dim, 4, t)
    _store_nibbles(code, codes, where, position * (head_dim // 2), head_dim, t)


def _planes(codes, scales, value, where, position, head_dim: int, t) -> None:
    """3 bits, but for the bos row, which is one of nibbles."""
    code = cuda.shared("uint8", head_dim)
    with T.If(position == 0):
        with T.Then():
            _quantize(code, scales, value, where, position, head_dim, BOS_BITS, t)
            _store_nibbles(code, codes, where, 0, head_dim, t)
        with T.Else():
            _quantize(code, scales, value, where, position, head_dim, 3, t)
            base = T.bind(head_dim // 2 + (position - 1) * (3 * head_dim // 8))
            _store_planes(code, codes, where, base, head_dim, t)
