"""Reductions over a warp's lanes by one or two instructions, where shuffles take five steps.

Every lane has the result. Compute capability 8.0 and later; all lanes of the warp take part.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import cuda


def sum_float64(value: Expr) -> Expr:
    """Sum of the lanes' float64, by two products with ones: 8 x 4 lanes, then the four sums that a
    lane's two columns make. A shuffle a step takes three times as long."""
    product = "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64"
    sums, one, zero = cuda.local("float64", 2), T.float64(1), T.float64(0)
    cuda.ptx(product, sums[0], sums[1], one, value, zero, zero)
    four = T.bind(sums[0] + sums[1])
    cuda.ptx(product, sums[0], sums[1], one, four, zero, zero)
    return T.bind(sums[0])


def max_uint32(value: Expr) -> Expr:
    """The largest of the lanes' uint32, by one instruction; of floats' bits, where none is < 0."""
    least = T.cuda.reduce_min_sync_u32(T.uint32(cuda.FULL_MASK), T.bitwise_not(value))
    return T.bind(T.bitwise_not(T.bind(least)))


def max_float32(value: Expr) -> Expr:
    """The same of float32 that are not negative."""
    return T.bind(T.reinterpret("float32", max_uint32(T.reinterpret("uint32", value))))


def max_float64(value: Expr) -> Expr:
    """The same of float64: the upper halves in an order of unsigned numbers, then the lower ones of
    those lanes whose upper half is the largest."""
    order = T.bind(in_order(T.reinterpret("int64", value)))
    upper = T.bind(T.cast(T.shift_right(order, T.int64(32)), "int32") ^ T.int32(-(1 << 31)))
    lower = T.reinterpret("uint32", T.cast(order & T.int64(0xFFFFFFFF), "int32"))
    upper = T.bind(T.reinterpret("uint32", upper))
    most = max_uint32(upper)
    least = max_uint32(T.bind(T.Select(upper == most, lower, T.uint32(0))))
    upper = T.cast(T.reinterpret("int32", most) ^ T.int32(-(1 << 31)), "int64")
    order = T.shift_left(upper, T.int64(32)) | T.cast(least, "int64")
    return T.bind(T.reinterpret("float64", in_order(T.bind(order))))


def in_order(bits: Expr) -> Expr:
    """A float64's bits as an int64 that rises with it, and back."""
    return bits ^ (T.shift_right(bits, T.int64(63)) & T.int64((1 << 63) - 1))
