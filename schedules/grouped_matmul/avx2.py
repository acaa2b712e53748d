"""grouped_matmul on AVX2: rows_x86.py with a group in two registers."""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.grouped_matmul import rows_x86
from schedules.intrin import avx2
from schedules.targets import CpuTarget

BYTES = 32  # of a register
KNOBS = {"streams": (4, 2, 8), "prefetch": (2048, 0, 4096)}


def codes(w, n, k: int, bits: int, group) -> list[Expr]:
    bytes_ = T.Bind(avx2.load(w, n, BYTES * group, lanes=BYTES))
    nibbles = [avx2.low_nibbles(bytes_), avx2.high_nibbles(bytes_)]
    if bits == 4:
        return nibbles
    half = T.Bind(avx2.load(w, n, k // 2 + 16 * group, lanes=16))
    twice = T.reinterpret("uint64x4", T.vectorcombine("uint8x32", half, half))
    left = T.shift_left(twice, avx2.constant("uint64", [4, 4, 2, 2]))
    right = T.shift_right(twice, avx2.constant("uint64", [0, 0, 2, 2]))
    mask = T.broadcast(T.uint8(0x30), BYTES)
    high = [T.reinterpret("uint8x32", shifted) & mask for shifted in (left, right)]
    return [low | top for low, top in zip(nibbles, high, strict=True)]


VECTORS = rows_x86.Vectors(
    bytes=BYTES,
    rows=2,
    codes=codes,
    multiply_add_bytes=avx2.multiply_add_bytes,
    add_products=lambda sums, a, b: sums + avx2.multiply_add_words(a, b),
)


def kernel(
    n: int, k: int, bits: int, target: CpuTarget, *, streams: int = 4, prefetch: int = 2048
) -> PrimFunc:
    return rows_x86.kernel(n, k, bits, streams, prefetch, VECTORS)
