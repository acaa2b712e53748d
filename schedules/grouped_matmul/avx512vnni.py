"""grouped_matmul on AVX-512 VNNI: rows_x86.py with a group a register and `vpdpwssd`.

A group takes 4 instructions of unpacking at 6 bits, 2 at 4, and 3 for the product: 3.5 and 2.5
cycles for 48 and 32 bytes, which memory gives a thread in some 10 and 7.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.grouped import GROUP
from schedules.grouped_matmul import rows_x86
from schedules.intrin import avx2, avx512
from schedules.targets import CpuTarget

KNOBS = {"streams": (8, 4, 2, 16), "prefetch": (2048, 0, 4096)}


def codes(w, n, k: int, bits: int, group) -> list[Expr]:
    bytes_ = T.Bind(avx2.load(w, n, 32 * group, lanes=32))
    low = avx512.rotate_right(avx512.repeat(bytes_), [0, 4]) & T.broadcast(T.uint8(15), GROUP)
    if bits == 4:
        return [low]
    bytes_ = T.Bind(avx2.load(w, n, k // 2 + 16 * group, lanes=16))
    high = avx512.rotate_right(avx512.repeat(bytes_), [60, 62, 0, 2])
    return [low | (high & T.broadcast(T.uint8(0x30), GROUP))]


VECTORS = rows_x86.Vectors(
    bytes=64,
    rows=4,
    codes=codes,
    multiply_add_bytes=avx512.multiply_add_bytes,
    add_products=avx512.dot_words,
)


def kernel(
    n: int, k: int, bits: int, target: CpuTarget, *, streams: int = 8, prefetch: int = 2048
) -> PrimFunc:
    return rows_x86.kernel(n, k, bits, streams, prefetch, VECTORS)
