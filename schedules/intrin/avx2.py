"""AVX2 instructions used from TVMScript, one function each; 32 bytes unless a name says half.

`a[x]` below is lane x. A "128-bit lane" is one of the two halves of a register, which most of AVX2
treats apart. https://www.intel.com/content/www/us/en/docs/intrinsics-guide
"""

from tvm.ir import Expr
from tvm.script import tirx as T

# What is the same on any machine, under one name with the instructions
from schedules.intrin.lanes import add as add
from schedules.intrin.lanes import ask_at as ask_at
from schedules.intrin.lanes import clear as clear
from schedules.intrin.lanes import constant as constant
from schedules.intrin.lanes import like as like
from schedules.intrin.lanes import load as load
from schedules.intrin.lanes import prefetch as prefetch
from schedules.intrin.lanes import prefetches_into_l2 as prefetches_into_l2
from schedules.intrin.lanes import registers as registers
from schedules.intrin.lanes import splat as splat
from schedules.intrin.lanes import store as store


def lookup(table: Expr, index: Expr) -> Expr:
    """vpshufb: out[j] = table[index[j]], table of 16 bytes for both lanes, index[j] < 16."""
    both = T.vectorcombine("uint8x32", table, table)
    return T.call_llvm_pure_intrin("uint8x32", "llvm.x86.avx2.pshuf.b", both, index)


def add_bytes(a: Expr, b: Expr) -> Expr:
    """vpaddusb, for sums below 256: LLVM re-trees plain additions, which costs registers."""
    return T.call_llvm_pure_intrin("uint8x32", "llvm.uadd.sat", a, b)


def add_words(a: Expr, b: Expr) -> Expr:
    """vpaddsw on int16, for sums that do not saturate: kept in order, as `add_bytes`."""
    return T.call_llvm_pure_intrin("int16x16", "llvm.sadd.sat", a, b)


def low_nibbles(bytes_: Expr) -> Expr:
    return bytes_ & T.broadcast(T.uint8(15), 32)


def high_nibbles(bytes_: Expr) -> Expr:
    return low_nibbles(shift_bytes(bytes_, -4))


def shift_bytes(bytes_: Expr, left: int) -> Expr:
    """vpsllw, or vpsrlw where left < 0, any register: there is no shift of bytes, so bits of the
    neighbouring byte enter; mask them off."""
    if left == 0:
        return bytes_
    dtype, lanes = str(bytes_.ty.dtype), bytes_.ty.dtype.lanes // 2
    pairs, amount = (
        T.reinterpret(f"uint16x{lanes}", bytes_),
        T.broadcast(T.uint16(abs(left)), lanes),
    )
    return T.reinterpret(dtype, (T.shift_left if left > 0 else T.shift_right)(pairs, amount))


def sign_half(a: Expr, b: Expr) -> Expr:
    """vpsignb on 16 bytes: a, 0 or -a as b is positive, zero or negative."""
    return T.call_llvm_pure_intrin("int8x16", "llvm.x86.ssse3.psign.b.128", a, b)


def multiply_add_bytes(unsigned: Expr, signed: Expr) -> Expr:
    """vpmaddubsw: int16 out[j] = u[2j] * s[2j] + u[2j+1] * s[2j+1], saturating."""
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def multiply_add_words(a: Expr, b: Expr) -> Expr:
    """vpmaddwd: int32 out[j] = a[2j] * b[2j] + a[2j+1] * b[2j+1]."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)


def dot_bytes(sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """vpdpbusd (AVX-VNNI): int32 out[j] = sums[j] + sum of u[4j+i] * s[4j+i], i < 4, wrapping."""
    return T.call_llvm_pure_intrin(
        "int32x8", "llvm.x86.avx512.vpdpbusd.256", sums, unsigned, signed
    )


def add_neighbours(a: Expr, b: Expr) -> Expr:
    """vphaddd: sums of two neighbours, within each 128-bit lane two of a, then two of b."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.phadd.d", a, b)


def nonzero_bytes(bytes_: Expr) -> Expr:
    """vpcmpeqb, vpmovmskb: bit j of an int32 is whether int8 j of 32 is not zero."""
    ones = T.cast(bytes_ != splat("int8", 0, 32), "int8x32")
    return T.call_llvm_pure_intrin("int32", "llvm.x86.avx2.pmovmskb", splat("int8", 0, 32) - ones)


def halves(vector: Expr, dtype: str) -> tuple[Expr, Expr]:
    """The two halves of a register, `dtype` theirs."""
    return T.vectorlow(dtype, vector), T.vectorhigh(dtype, vector)


def sum_lanes(vector: Expr) -> Expr:
    """The int32 sum of all lanes."""
    return T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", vector)


def interleave_low(a: Expr, b: Expr, lanes: int) -> Expr:
    """vpunpckl: a[0], b[0], a[1], b[1], ... of the lower half of each 128-bit lane."""
    return _interleave(a, b, lanes, 0)


def interleave_high(a: Expr, b: Expr, lanes: int) -> Expr:
    """vpunpckh: the same of the upper half of each 128-bit lane."""
    return _interleave(a, b, lanes, lanes // 4)


def _interleave(a: Expr, b: Expr, lanes: int, first: int) -> Expr:
    quarter, half = lanes // 4, lanes // 2
    starts = [lane + first + j for lane in (0, half) for j in range(quarter)]
    return T.Shuffle([a, b], [i for s in starts for i in (s, lanes + s)])
