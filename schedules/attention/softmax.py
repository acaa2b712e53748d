"""One step of an online softmax: scores of a block into weights, sums rescaled.

    s[:] = p[:] * key_scale                      masked beyond the row's own position
    peak' = max(peak, max s)
    rescale = e^(peak - peak')                   of what was summed so far
    total = total * rescale + sum e^(s - peak')
    p[:] = e^(s - peak') * value_scale

A block wholly beyond the row's position leaves peak and total and makes p zero, rescale one.
"""

import operator
from typing import NamedTuple

from tvm.script import tirx as T
from tvm.tirx import Buffer

from schedules.intrin.exp import exp
from schedules.intrin.vector import each, fill, fold, store


class State(NamedTuple):
    """Of each query, what its softmax has seen."""

    peak: Buffer  # the largest score
    total: Buffer  # of e^(score - peak)
    rescale: Buffer  # what the last step multiplied `total` by, and o is to be multiplied by


def softmax_step(p, key_scale, value_scale, state: State, i, seen, keys: int, lanes: int) -> None:
    """Query i's scores p[i, :keys], of which the first `seen` count, become weights."""
    peaks, sums = (T.alloc_buffer((lanes,), "float32", scope="local") for _ in range(2))
    limit = T.bind(T.cast(T.max(T.min(seen, T.int64(keys)), T.int64(0)), "int32"))

    def mask(j, lane):
        score = T.Select(j < limit, p[i, j] * key_scale[j], T.min_value("float32"))
        store(p, (i, j), score)
        store(peaks, (lane,), T.max(peaks[lane], p[i, j]))

    def weigh(j, lane):
        weight = T.bind(T.Select(j < limit, exp(p[i, j] - peaks[0]), T.float32(0)))
        store(sums, (lane,), sums[lane] + weight)
        store(p, (i, j), weight * value_scale[j])

    fill(lanes, peaks, state.peak[i])
    fill(lanes, sums, T.float32(0))
    each(keys, lanes, mask)
    fold(lanes, peaks, T.max)
    each(keys, lanes, weigh)
    fold(lanes, sums, operator.add)
    store(state.rescale, (i,), exp(state.peak[i] - peaks[0]))
    store(state.peak, (i,), peaks[0])
    store(state.total, (i,), state.total[i] * state.rescale[i] + sums[0])
