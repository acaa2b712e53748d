"""NEON instructions used from TVMScript, one function each; registers of 16 bytes.

`a[x]` below is lane x. https://developer.arm.com/architectures/instruction-sets/intrinsics
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin.lanes import splat

# Of a form of dot product: (sums int32x4, a int8x16, b int8x16) -> sums of groups of four products
Dot = Callable[[Expr, Expr, Expr], Expr]


def lookup(table: Expr, index: Expr) -> Expr:
    """tbl: out[j] = table[index[j]], 16 bytes of table, 0 where index[j] >= 16."""
    return T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.tbl1", table, index)


def low_nibbles(bytes_: Expr) -> Expr:
    return bytes_ & splat("uint8", 15, 16)


def high_nibbles(bytes_: Expr) -> Expr:
    """ushr: unlike x86's, a shift of bytes."""
    return T.shift_right(bytes_, splat("uint8", 4, 16))


def halves(vector: Expr, dtype: str) -> tuple[Expr, Expr]:
    """The two halves of a register, `dtype` theirs: no instruction, the next one takes either."""
    return T.vectorlow(dtype, vector), T.vectorhigh(dtype, vector)


def dot(sums: Expr, a: Expr, b: Expr) -> Expr:
    """sdot (dotprod): sums[j] += a[4j] * b[4j] + ... + a[4j+3] * b[4j+3], int8 in int32."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot", sums, a, b)


def multiply_pairs(sums: Expr, a: Expr, b: Expr) -> Expr:
    """smmla (i8mm): the 2 x 2 int32 product of two rows of 8 bytes by two rows of 8, added."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smmla", sums, a, b)


def multiply_long(a: Expr, b: Expr) -> Expr:
    """smull: int16x8 of the products of int8x8."""
    return T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.smull", a, b)


def add_pairs_long(words: Expr) -> Expr:
    """saddlp: int32x4 of the sums of two neighbours of int16x8; with an addition, sadalp."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", words)


def add_neighbours(a: Expr, b: Expr) -> Expr:
    """addp: int32 sums of two neighbours, two of a, then two of b."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp", a, b)


def sum_lanes(vector: Expr) -> Expr:
    """addv: the int32 sum of all lanes."""
    return T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", vector)


def quad(vector: Expr, lane: int) -> Expr:
    """int8x16 of four bytes, lane `lane` of int32x4, over and over: sdot takes it by element."""
    return T.reinterpret("int8x16", T.Shuffle([vector], [lane] * 4))


def zip_lanes(a: Expr, b: Expr, half: int) -> Expr:
    """zip1, zip2: a[0], b[0], a[1], b[1], ... of the lower or upper halves of two registers."""
    lanes = int(a.ty.dtype.lanes)
    first = half * lanes // 2
    return T.Shuffle([a, b], [i for j in range(first, first + lanes // 2) for i in (j, lanes + j)])


def transpose(rows: list[Expr]) -> list[Expr]:
    """Four registers of 16 bytes -> uint8x16 v: bytes 4v .. 4v + 3, of each the four rows'."""
    a, b, c, d = rows
    pairs = [[zip_lanes(*two, half=z) for two in ((a, b), (c, d))] for z in (0, 1)]
    words = [[T.Bind(T.reinterpret("uint16x8", v)) for v in pair] for pair in pairs]
    return [
        T.Bind(T.reinterpret("uint8x16", zip_lanes(low, high, z)))
        for low, high in words
        for z in (0, 1)
    ]
