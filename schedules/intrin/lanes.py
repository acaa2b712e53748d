"""Vectors of any machine as TVMScript expressions: loads, stores and what needs no instruction of
its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tvm.ir import Expr
from tvm.script import tirx as T


def load(buffer, *index: Expr | int, lanes: int) -> Expr:
    """`lanes` elements from `index` on; aligned only as far as the index is seen to be."""
    last = index[-1] if lanes == 1 else T.ramp(index[-1], 1, lanes)
    return buffer[(*index[:-1], last)]


def store(buffer, *index: Expr | int, value: Expr, lanes: int) -> None:
    last = index[-1] if lanes == 1 else T.ramp(index[-1], 1, lanes)
    T.buffer_store(buffer, value, [*index[:-1], last])


def add(buffer, *index: Expr | int, value: Expr, lanes: int) -> None:
    store(buffer, *index, value=load(buffer, *index, lanes=lanes) + value, lanes=lanes)


def like(dtype: str, lanes: int) -> str:
    """The dtype of `lanes` elements."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(dtype: str, value: int, lanes: int) -> Expr:
    one = T.cast(T.int32(value), dtype)
    return T.broadcast(one, lanes) if lanes > 1 else one


def clear(buffer, count: int, dtype: str, lanes: int) -> None:
    """buffer[:count, :lanes] = 0, unrolled."""
    for i in range(count):
        store(buffer, i, 0, value=splat(dtype, 0, lanes), lanes=lanes)


def registers(count: int, dtype: str, lanes: int) -> list:
    """`count` vectors of zeros that a loop adds to.

    A buffer each, and not of scope "local": TVM takes that from the heap on a CPU, and so it does
    what is above 1 KB or shares memory with such. A prefetch in the loop may read the heap for all
    that LLVM knows, which then stores every sum after every addition. An array below 1 KB at
    constant indices stays in registers too, as long as nothing larger shares its memory."""
    found = [T.alloc_buffer((lanes,), dtype) for _ in range(count)]
    for register in found:
        store(register, 0, value=splat(dtype, 0, lanes), lanes=lanes)
    return found


def constant(dtype: str, values: list[int]) -> Expr:
    """A vector of constants."""
    return T.Shuffle([T.cast(T.int32(v), dtype) for v in values], list(range(len(values))))


L1, L2 = 3, 2  # what LLVM calls the locality of a prefetch that fills L1, or L2 alone
_filled: ContextVar[int] = ContextVar("filled", default=L1)
_times: ContextVar[int] = ContextVar("times", default=1)


@contextmanager
def prefetches_into_l2(times: int) -> Iterator[None]:
    """What is parsed within asks for lines into L2 and not, as elsewhere, into L1, and that often
    on the way to each. Also a decorator of a kernel's factory."""
    before = _filled.set(L2), _times.set(times)
    try:
        yield
    finally:
        _filled.reset(before[0])
        _times.reset(before[1])


def ask_at(farthest: int, unit: int = 1) -> list[int]:
    """How far ahead a line is asked for, each time: multiples of `unit`, the farthest first; none
    if that is 0."""
    times = _times.get()
    found = [-(-farthest * i // (times * unit)) * unit for i in range(times, 0, -1)]
    return list(dict.fromkeys(found)) if farthest else []


def prefetch(buffer, *index: Expr | int) -> None:
    """Ask for the cache line at an index, which may lie past the end; never faults."""
    read, locality, data = T.int32(0), T.int32(_filled.get()), T.int32(1)
    address = T.address_of(buffer[index])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, read, locality, data))
