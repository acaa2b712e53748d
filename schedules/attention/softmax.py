"""One step of an online softmax in float64: a block's dot products into weights.

    s[:] = dots[:] * (key_scale * factor)        masked beyond the row's own position
    peak' = max(peak, max s)
    rescale = e^(peak - peak')                   of what was summed so far
    e[:] = e^(s - peak'), total = total * rescale + sum e
    quantised: w[:] = e * value_scale, unit = max w / 255, p[:] = rint(w / unit)
    16 bits:   p[:] = e, unit = 1

A block wholly beyond the row's position leaves peak and total, and makes p zero, rescale one.
"""

import operator
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import Buffer

from schedules.intrin.exp import exp, nearest
from schedules.intrin.vector import each, fill, fold, store

SMALLEST_UNIT = 1e-300  # a block of zeros: what divides them does not matter


@dataclass(frozen=True)
class State:
    """What is known of every query of a tile, f64[queries] each."""

    factor: Buffer  # of the dot products: 1/sqrt(D), times the query's scale where quantised
    peak: Buffer  # largest score
    total: Buffer  # sum of e^(s - peak)
    rescale: Buffer  # of this block
    unit: Buffer  # of this block's weights


def softmax_step(p, key_scale, value_scale, state: State, i, seen, keys: int, lanes: int) -> None:
    """Query i's products p[i, :keys], of which the first `seen` count, become weights."""
    is_quantized = str(p.dtype) == "int32"
    score, peaks, sums, tops = (
        T.alloc_buffer((size,), "float64", scope="local") for size in (keys, lanes, lanes, lanes)
    )
    limit = T.bind(T.cast(T.max(T.min(seen, T.int64(keys)), T.int64(0)), "int32"))
    fill(lanes, peaks, state.peak[i])
    fill(lanes, sums, T.float64(0))
    fill(lanes, tops, T.float64(0))

    def mask(j, lane):
        product = T.cast(p[i, j], "float64") * (key_scale[j] * state.factor[i])
        store(score, (j,), T.Select(j < limit, product, T.min_value("float64")))
        store(peaks, (lane,), T.max(peaks[lane], score[j]))

    def weigh(j, lane):
        is_seen = score[j] > T.min_value("float64")  # one comparison, where that of j is seven
        e = T.bind(T.Select(is_seen, exp(score[j] - peaks[0]), T.float64(0)))
        store(sums, (lane,), sums[lane] + e)
        if is_quantized:
            # Scales past the limit were never loaded: zero times what lies there may be NaN.
            store(score, (j,), T.Select(is_seen, e * value_scale[j], T.float64(0)))
            store(tops, (lane,), T.max(tops[lane], score[j]))
        else:
            store(p, (i, j), e)

    def quantize(j, lane):
        divisor = T.max(state.unit[i], T.float64(SMALLEST_UNIT))
        store(p, (i, j), T.cast(nearest(score[j] / divisor), "int32"))

    each(keys, lanes, mask)
    fold(lanes, peaks, T.max)
    each(keys, lanes, weigh)
    fold(lanes, sums, operator.add)
    store(state.rescale, (i,), exp(state.peak[i] - peaks[0]))
    store(state.peak, (i,), peaks[0])
    store(state.total, (i,), state.total[i] * state.rescale[i] + sums[0])
    if is_quantized:
        fold(lanes, tops, T.max)
        store(state.unit, (i,), tops[0] / T.float64(255))
        each(keys, lanes, quantize)
    else:
        store(state.unit, (i,), T.float64(1))
