"""exp in float64 by a polynomial: T.exp is a libm call per element.

    e^x = 2^n e^r,  n = rint(x / ln 2),  r = x - n ln 2 in two steps (Cody, Waite), |r| <= ln 2 / 2
    e^r = sum of r^k / k!, k <= 12: the next term is below 2e-16

Within 4e-16 relative on [-708, 0], the arguments of a softmax; lower ones are taken for -708.
"""

import math

from tvm.ir import Expr
from tvm.script import tirx as T

LOWEST = -708.0  # the result is a normal float64
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286068203094172e-06  # the first has 17 bits
DEGREE = 12
# 1.5 * 2**52: adding it to |v| <= 2**51 leaves rint(v), ties to even, in the low mantissa bits.
ROUND_MAGIC = 6755399441055744.0
ROUND_MAGIC_BITS = 0x4338000000000000


def nearest(v: Expr) -> Expr:
    """int64 of rint(v), half to even, |v| <= 2**51; v must be no product (see vector.nearest)."""
    return T.reinterpret("int64", v + T.float64(ROUND_MAGIC)) - T.int64(ROUND_MAGIC_BITS)


def exp(x: Expr) -> Expr:
    """Emits bindings in the current frame; scalar or vector, x <= 0."""
    clamped = T.bind(T.max(x, T.float64(LOWEST)))
    # Contraction moves a tie: |r| stays small. No cast from int64: AVX2 does it lane by lane.
    bits = T.bind(T.reinterpret("int64", clamped * T.float64(LOG2_E) + T.float64(ROUND_MAGIC)))
    n = T.bind(T.reinterpret("float64", bits) - T.float64(ROUND_MAGIC))
    r = T.bind(clamped - n * T.float64(LN2_HIGH) - n * T.float64(LN2_LOW))
    p = T.float64(1 / math.factorial(DEGREE))
    for k in range(DEGREE - 1, -1, -1):
        p = p * r + T.float64(1 / math.factorial(k))
    exponent = T.shift_left(bits, T.int64(52))  # the magic number's bits all leave
    return T.reinterpret("float64", T.reinterpret("int64", T.bind(p)) + exponent)
