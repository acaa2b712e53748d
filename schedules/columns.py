"""Lists of columns that a walk over columns of ternary weights takes, a group of them at a time."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T


def write_columns(column, count, group: int, column_of: Callable[[Expr], Expr], ahead: int = 0):
    """column[i] = column_of(i) for i in count, the last one up to whole groups and `ahead` more"""
    with T.serial(count) as i:
        T.buffer_store(column, column_of(i), [i])
    with T.If(count > 0), T.Then():
        with T.serial(-count % group + ahead * group) as i:
            T.buffer_store(column, column[count - 1], [count + i])


def gather(qs, total, q, m, column, count, group: int):
    """qs[i] = q[m] of the listed columns, 0 up to whole groups; total[0] = their sum"""
    T.buffer_store(total, T.int32(0), [0])
    with T.serial(count) as i:
        T.buffer_store(qs, q[m, column[i]], [i])
        T.buffer_store(total, total[0] + T.cast(qs[i], "int32"), [0])
    with T.serial(-count % group) as i:
        T.buffer_store(qs, T.int8(0), [count + i])


def list_length(k: int, group: int, ahead: int = 0) -> int:
    """Room for a list of all of K columns."""
    return (-(-k // group) + ahead) * group
