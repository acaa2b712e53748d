"""kv_append on CUDA: a warp a head, a lane every 32nd column; the packed row is put together in
shared memory.

    for m, h, kv in M, Hkv, 2:           blockIdx.x; a warp each, up to 16 of one row a block
        amax = max |x|                   warp shuffles
        scale = float16(amax / qmax), in 2^-14 .. 65504
        code[D] = rint(x / scale) + qmax shared
        codes[slot, h, kv, row] = planes of code, a byte a lane

A step's rows of a slot stand at different positions, so no two blocks write the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

MAX_WARPS = 16


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: GpuTarget
) -> PrimFunc:
    width = (num_heads + 2 * num_kv_heads) * head_dim
    code_dtype = "float16" if kv_bits == 16 else "uint8"
    write = {16: _halves, 4: _nibbles, 3: _planes}[kv_bits]
    rows, num_slots = Var("M", "int64"), Var("num_slots", "int64")
    size, scale_size = Var("size", "int64"), Var("scale_size", "int64")

    heads = 2 * num_kv_heads
    warps = max(n for n in range(1, MAX_WARPS + 1) if heads % n == 0)

    def append_head(codes, scales, qkv, slots, positions, block, warp, t):
        m, head = T.bind(block * warps // heads), T.bind(block * warps % heads + warp)
        kv, h = T.bind(head // num_kv_heads), T.bind(head % num_kv_heads)
        start = T.bind((num_heads + head) * head_dim)
        where = (slots[m], h, kv)
        own = Head(cuda.shared("uint8", warps * head_dim), warp * head_dim, head_dim, t)
        write(own, codes, scales, lambda d: qkv[m, start + d], where, positions[m])

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
                with cuda.blocks(rows * (heads // warps)) as block:
                    with cuda.threads(warps, "y") as warp, cuda.threads(cuda.WARP) as t:
                        append_head(codes, scales, qkv, slots, positions, block, warp, t)

    return kv_append


def head_scale(amax: Expr, qmax: Expr) -> Expr:
    """float32 of the float16 that the cache keeps"""
    ratio = T.min(amax / qmax, T.float32(LARGEST_SCALE))
    half = T.cast(T.cast(ratio, "float16"), "float32")
    return T.max(half, T.float32(SMALLEST_SCALE))


@dataclass(frozen=True)
class Head:
    """A warp's row of D columns; its codes lie in shared memory from `first` on."""

    codes: Any
    first: Expr
    dim: int
    t: Expr  # lane

    def each(self, parts: int = 1):
        """Every column, or every byte of a plane with `parts` columns in it."""
        return cuda.strided(self.dim // parts, self.t, cuda.WARP)

    def gathered(self, parts: int, i: Expr, of_code: Callable[[Expr], Expr]) -> Expr:
        return gathered(Shifted(self.codes, self.first), self.dim, parts, i, of_code)


@dataclass(frozen=True)
class Shifted:
    """A buffer from an index on."""

    buffer: Any
    first: Expr

    def __getitem__(self, index: Expr) -> Expr:
        return self.buffer[self.first + index]


def _halves(head: Head, codes, scales, value, where, position) -> None:
    with head.each() as d:
        cuda.store(codes, T.cast(value(d), "float16"), *where, position * head.dim + d)


def _quantize(head: Head, scales, value, where, position, bits: int) -> None:
    """The codes and the scale of a head's row."""
    qmax = 2 ** (bits - 1) - 1
    peak = cuda.local("float32", 1)
    cuda.store(peak, T.float32(0), 0)
    with head.each() as d:
        cuda.store(peak, T.max(peak[0], T.abs(value(d))), 0)
    amax = cuda.warp_reduce(peak[0], "max")
    scale = T.bind(head_scale(amax, T.float32(qmax)))
    with cuda.when(head.t == 0):
        cuda.store(scales, T.cast(scale, "float16"), *where, position)
    with head.each() as d:
        cuda.store(head.codes, quantized(value(d) / scale, qmax), head.first + d)
    cuda.sync()


def _store_nibbles(head: Head, codes, where, base) -> None:
    with head.each(2) as i:
        cuda.store(codes, head.gathered(2, i, lambda c: c), *where, base + i)


def _store_planes(head: Head, codes, where, base) -> None:
    with head.each(4) as i:
        low = head.gathered(4, i, lambda c: c & T.uint8(3))
        cuda.store(codes, low, *where, base + i)
    with head.each(8) as i:
        high = head.gathered(8, i, lambda c: c >> T.uint8(2))
        cuda.store(codes, high, *where, base + head.dim // 4 + i)


def _nibbles(head: Head, codes, scales, value, where, position) -> None:
    _quantize(head, scales, value, where, position, 4)
    _store_nibbles(head, codes, where, position * (head.dim // 2))


def _planes(head: Head, codes, scales, value, where, position) -> None:
    """3 bits, but for the bos row, which is one of nibbles: all of a block are of one position."""
    with T.If(position == 0):
        with T.Then():
            _quantize(head, scales, value, where, position, BOS_BITS)
            _store_nibbles(head, codes, where, 0)
        with T.Else():
            _quantize(head, scales, value, where, position, 3)
            base = T.bind(head.dim // 2 + (position - 1) * (3 * head.dim // 8))
            _store_planes(head, codes, where, base)
