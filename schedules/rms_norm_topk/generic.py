"""rms_norm_topk_int8 on any CPU: norm, exact TopK, INT8 absmax and the list of non-zero columns.

    for m in M:                              parallel when M > 1
        h = (x[m, :] * rstd) * gain
        q[m, :] = quantize(h)
        size[:] = |h|                        kept in L1: the selection reads it many times
        low, high = 0, gamma                 bit patterns: non-negative floats order as they do
        while high - low > 1, not exactly k reach low:
            reached[L] += size >= middle     halves the range; some 16 passes for Gaussian rows
        q[m, :] = 0 where size < low
        last ties of low in q = 0            only where more than k reach low
        index[m, count] = i; count += q[m, i] != 0     no branch: a store that may be overwritten

    tile | value    | bound by
    L    | lanes(8) | the accumulators of rms_norm, shared with it

k = K skips the selection. A row's scratch is 4 K bytes (28 KB at K = 6912, within L1). Families
that list several columns at once are this kernel with another `list_first`.
Measured: Zen 4, one row, 2026-11-23, SSE2: 2560 columns, 1280 kept, 5.7 us. avx512vnni.py and
avx2.py have the same norm and selection.
"""

import operator
from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin.vector import each, fill, fold, store
from schedules.rms_norm.generic import (
    SMALLEST_STAT,
    int8_code,
    int8_factor,
    int8_scale,
    normed,
    write_max,
    write_rstd,
)
from schedules.targets import CpuTarget

MAGNITUDE = 0x7FFFFFFF  # a float32 without its sign
# (q, index, found, m, k) lists row m from column 0 on as far as whole vectors go: how far that is
ListFirst = Callable[..., int]


def list_none(q, index, found, m, k: int) -> int:
    return 0


def kernel(
    k: int, keep: int, eps: float, target: CpuTarget, *, list_first: ListFirst = list_none
) -> PrimFunc:
    """(x, gain, q, scale, index, count) for rows of k columns of which the `keep` largest stay."""
    if not 1 <= keep <= k:
        raise ValueError(f"rms_norm_topk: keep {keep} asked, rows have {k} columns")
    lanes = target.lanes(8)
    write_codes = _masked_codes(k, keep, lanes) if keep < k else _all_codes(k, lanes)

    @T.inline
    def quantize_row(x, gain, q, scale, index, count, m):
        sums = T.alloc_buffer((lanes,), "float64", scope="local")
        peaks = T.alloc_buffer((lanes,), "float32", scope="local")
        facts = T.alloc_buffer((3,), "float32", scope="local")  # rstd, gamma, factor

        write_rstd(x, m, k, eps, lanes, sums, facts)
        write_max(x, gain, m, k, lanes, sums, peaks, facts)
        facts[1] = T.max(facts[1], T.float32(SMALLEST_STAT))
        scale[m] = int8_scale(facts[1])
        facts[2] = int8_factor(facts[1])
        write_codes(x, gain, q, facts, m)
        list_nonzero(q, index, count, m, k, list_first)

    @T.prim_func(s_tir=True)
    def rms_norm_topk(
        x_: T.handle,
        gain: T.Buffer((k,), "float32"),
        q_: T.handle,
        scale_: T.handle,
        index_: T.handle,
        count_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, k), "float32")
        q = T.match_buffer(q_, (rows, k), "int8")
        scale = T.match_buffer(scale_, (rows,), "float32")
        index = T.match_buffer(index_, (rows, k), "int32")
        count = T.match_buffer(count_, (rows,), "int32")
        with T.sblock("root"):
            if rows == 1:
                quantize_row(x, gain, q, scale, index, count, 0)
            else:
                for m in T.parallel(rows):
                    quantize_row(x, gain, q, scale, index, count, m)

    return rms_norm_topk


def list_nonzero(q, index, count, m, k: int, list_first: ListFirst) -> None:
    """index[m, :count[m]] = columns of non-zero q. Before column i count <= i, so that a store of
    as many columns as are looked at stays within the row."""
    found = T.alloc_buffer((1,), "int32", scope="local")
    store(found, (0,), T.int32(0))
    with T.serial(list_first(q, index, found, m, k), k) as i:
        store(index, (m, found[0]), i)
        store(found, (0,), found[0] + T.cast(q[m, i] != T.int8(0), "int32"))
    store(count, (m,), found[0])


def _all_codes(k: int, lanes: int) -> Callable:
    def write_codes(x, gain, q, facts, m):
        def quantize(i, j):
            store(q, (m, i), int8_code(normed(x, gain, facts, m, i), facts[2]))

        each(k, lanes, quantize)

    return write_codes


def _masked_codes(k: int, keep: int, lanes: int) -> Callable:
    """The codes of the `keep` largest |h|; ties at the threshold go to the lower index."""

    def write_all(x, gain, q, size, facts, m):
        def write(i, j):
            h = normed(x, gain, facts, m, i)
            store(q, (m, i), int8_code(h, facts[2]))
            store(size, (i,), magnitude(h))

        each(k, lanes, write)

    @T.inline
    def write_codes(x, gain, q, facts, m):
        size = T.alloc_buffer((k,), "int32", scope="global")  # magnitude of each h
        reached = T.alloc_buffer((lanes,), "int32", scope="local")
        low = T.alloc_buffer((1,), "int32", scope="local")
        high = T.alloc_buffer((1,), "int32", scope="local")
        surplus = T.alloc_buffer((1,), "int32", scope="local")  # that reach low beyond `keep`
        last = T.alloc_buffer((1,), "int32", scope="local")

        write_all(x, gain, q, size, facts, m)
        low[0] = 0
        high[0] = magnitude(facts[1]) + 1
        surplus[0] = k - keep
        while high[0] - low[0] > 1 and surplus[0] > 0:
            middle: T.let = low[0] + T.shift_right(high[0] - low[0], 1)
            count_at_least(k, lanes, size, reached, middle)
            if reached[0] >= keep:
                low[0] = middle
                surplus[0] = reached[0] - keep
            else:
                high[0] = middle
        each(k, lanes, lambda i, j: store(q, (m, i), kept(q[m, i], size[i], low[0])))
        last[0] = k
        while surplus[0] > 0 and last[0] > 0:  # NaN reaches every threshold and ties with none
            last[0] = last[0] - 1
            if size[last[0]] == low[0]:
                q[m, last[0]] = T.int8(0)
                surplus[0] = surplus[0] - 1

    return write_codes


def count_at_least(k: int, lanes: int, size, reached, bound) -> None:
    """reached[0] = how many sizes are at least `bound`."""

    def count(i, j):
        store(reached, (j,), reached[j] + T.cast(size[i] >= bound, "int32"))

    fill(lanes, reached, T.int32(0))
    each(k, lanes, count)
    fold(lanes, reached, operator.add)


def kept(code, size, threshold):
    return T.Select(size >= threshold, code, T.int8(0))


def magnitude(h):
    """|h| as an integer that orders as |h| does."""
    return T.bitwise_and(T.reinterpret("int32", h), T.int32(MAGNITUDE))
