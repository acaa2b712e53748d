"""rms_norm_topk_int8 on any CPU: norm, exact TopK, INT8 absmax and the list of non-zero columns.

    for m in M:                              parallel when M > 1
        h[:] = (x[m, :] * rstd) * gain       kept in L1: the selection reads it many times
        threshold = 0                        the k-th largest |h|, found bit by bit from the top
        for bit in 30 .. 0:                  non-negative floats order as their bit patterns do
            reached[L] += |h| >= threshold | 1 << bit
            if sum(reached) >= k: threshold |= 1 << bit
        q[m, :] = quantize(h) where |h| > threshold, and at the first ties of it
        index[m, count] = i; count += q[m, i] != 0     no branch: a store that may be overwritten

    tile | value    | bound by
    L    | lanes(8) | the accumulators of rms_norm, shared with it

k = K skips the selection. A row's scratch is 4 K bytes (28 KB at K = 6912, within L1).

Measured: not yet.
"""

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin.vector import each, fold
from schedules.rms_norm.generic import (
    SMALLEST_STAT,
    int8_code,
    int8_factor,
    int8_scale,
    normed,
    write_max,
    write_rstd,
)
from schedules.targets import TargetSpec

MAGNITUDE = 0x7FFFFFFF  # a float32 without its sign


def kernel(k: int, keep: int, eps: float, target: TargetSpec) -> PrimFunc:
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
        list_nonzero(q, index, count, k, m)

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


@T.inline
def list_nonzero(q, index, count, k, m):
    """index[m, :count[m]] = columns of non-zero q; count <= i keeps every store in the row."""
    found = T.alloc_buffer((1,), "int32", scope="local")
    found[0] = 0
    for i in T.serial(k):
        index[m, found[0]] = i
        found[0] = found[0] + T.cast(q[m, i] != T.int8(0), "int32")
    count[m] = found[0]


def _all_codes(k: int, lanes: int) -> Callable:
    @T.inline
    def write_codes(x, gain, q, facts, m):
        @T.inline
        def quantize(i, j):
            q[m, i] = int8_code(normed(x, gain, facts, m, i), facts[2])

        each(k, lanes, quantize)

    return write_codes


def _masked_codes(k: int, keep: int, lanes: int) -> Callable:
    """The codes of the `keep` largest |h|; ties at the threshold go to the lower index."""

    @T.inline
    def write_codes(x, gain, q, facts, m):
        h = T.alloc_buffer((k,), "float32", scope="global")
        reached = T.alloc_buffer((lanes,), "int32", scope="local")
        state = T.alloc_buffer((2,), "int32", scope="local")  # threshold, ties still to take

        @T.inline
        def store(i, j):
            h[i] = normed(x, gain, facts, m, i)

        @T.inline
        def count_at_least(bound):
            @T.inline
            def add(i, j):
                reached[j] = reached[j] + T.cast(magnitude(h[i]) >= bound, "int32")

            for j in T.vectorized(lanes):
                reached[j] = T.int32(0)
            each(k, lanes, add)
            fold(lanes, reached, lambda a, b: a + b)

        each(k, lanes, store)
        state[0] = 0
        for step in T.serial(31):
            count_at_least(state[0] | T.shift_left(T.int32(1), 30 - step))
            if reached[0] >= keep:
                state[0] = state[0] | T.shift_left(T.int32(1), 30 - step)
        count_at_least(state[0] + 1)
        state[1] = keep - reached[0]

        @T.inline
        def quantize(i, j):
            q[m, i] = T.Select(magnitude(h[i]) >= state[0], int8_code(h[i], facts[2]), T.int8(0))

        each(k, lanes, quantize)
        for i in T.serial(k):
            if magnitude(h[i]) == state[0]:
                if state[1] <= 0:
                    q[m, i] = T.int8(0)
                state[1] = state[1] - 1

    return write_codes


def magnitude(h):
    """|h| as an integer that orders as |h| does."""
    return T.bitwise_and(T.reinterpret("int32", h), T.int32(MAGNITUDE))
