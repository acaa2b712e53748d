"""Loops over whole vectors with narrower ones for the rest, and rounding without a library call.

Called while a TVMScript body is parsed; they emit loops around what `body` emits. Bodies are plain
Python: each call of a `T.inline` walks the interpreter's stack, some 50 ms. `rounded` has no branch
and no call on any target, where `T.nearbyint` on baseline x86-64 is a libm call per element.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

# 1.5 * 2**23: adding it to |v| <= 2**22 leaves rint(v), ties to even, in the low mantissa bits.
ROUND_MAGIC = 12582912.0
ROUND_MAGIC_BITS = 0x4B400000


def each(n: int, lanes: int, body: Callable, start: int = 0) -> None:
    """body(i, j) for i in start..n, vectorised, j the lane of i; the rest in halved vectors."""
    if start == n:
        return
    whole = (n - start) // lanes
    if whole > 1:
        with T.serial(whole) as i, T.vectorized(lanes) as j:
            body(start + i * lanes + j, j)
    elif whole == 1 and lanes > 1:
        with T.vectorized(lanes) as j:
            body(start + j, j)
    elif whole == 1:
        body(start, 0)
    each(n, lanes // 2, body, start + whole * lanes)


def store(buffer: Buffer, indices: tuple, value: Expr) -> None:
    """buffer[indices] = value, for bodies."""
    T.buffer_store(buffer, value, list(indices))


def fill(lanes: int, buffer: Buffer, value: Expr) -> None:
    """buffer[0:lanes] = value."""
    with T.vectorized(lanes) as j:
        store(buffer, (j,), value)


def fold(lanes: int, buffer: Buffer, combine: Callable) -> None:
    """buffer[0] = combine over buffer[0:lanes], lanes a power of two, by halves."""
    while lanes > 1:
        lanes //= 2
        with T.vectorized(lanes) as j:
            store(buffer, (j,), combine(buffer[j], buffer[lanes + j]))


def rounded(v: Expr, lowest: int, highest: int) -> Expr:
    """int32 of rint(clamp(v)), half to even. The clamp stands between the product that v often
    is and the addition, which thus cannot be contracted into an FMA that would round once."""
    return nearest(T.max(T.min(v, T.float32(highest)), T.float32(lowest)))


def nearest(v: Expr) -> Expr:
    """int32 of rint(v), |v| <= 2**22; if v is a product it may be rounded once with the addition.

    The subtraction is of integers: TVM simplifies (v + c) - c of floats to v.
    """
    return T.reinterpret("int32", v + T.float32(ROUND_MAGIC)) - T.int32(ROUND_MAGIC_BITS)
