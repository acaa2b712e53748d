"""exp in float32 by a polynomial: T.exp is a libm call per element.

    e^x = 2^n e^r,  n = rint(x / ln 2),  r = x - n ln 2 in two steps (Cody, Waite), |r| <= ln 2 / 2
    e^r = 1 + r + r^2 P(r),   P of degree 5 (Cephes expf: S. Moshier, netlib.org/cephes)

Within 2 ulp on [-87, 88]; arguments beyond are taken for the nearer end, NaN for either.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin.vector import nearest

LOWEST, HIGHEST = -87.0, 88.0  # so that 2^n and the result are normal floats
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the first has 10 bits: n * LN2_HIGH is exact
COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def exp(x: Expr) -> Expr:
    """Emits bindings in the current frame; scalar or vector."""
    clamped = T.bind(T.max(T.min(x, T.float32(HIGHEST)), T.float32(LOWEST)))
    power = T.bind(nearest(clamped * T.float32(LOG2_E)))
    n = T.bind(T.cast(power, "float32"))
    r = T.bind(clamped - n * T.float32(LN2_HIGH) - n * T.float32(LN2_LOW))
    p = T.float32(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = p * r + T.float32(coefficient)
    mantissa = T.bind(p * (r * r) + r + T.float32(1))
    exponent = T.shift_left(power, T.int32(23))
    return T.reinterpret("float32", T.reinterpret("int32", mantissa) + exponent)
