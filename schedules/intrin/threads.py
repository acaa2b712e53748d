"""Threads that a parallel region will have, known when the kernel runs and not when it is built."""

from tvm.ir import Expr
from tvm.script import tirx as T


def count() -> Expr:
    return T.cast(T.call_packed("runtime.NumThreads"), "int32")


def share(total: int | Expr, thread: Expr, threads: Expr) -> Expr:
    """First of `total` items that belongs to `thread`; the next thread's first ends the share."""
    return T.floordiv(total * thread, threads)
