"""One step of an online softmax: scores of a block into weights, sums rescaled.

    s[:] = p[:] * key_scale                      masked beyond the row's own position
    peak' = max(peak, max s)
    rescale = e^(peak - peak')                   of what was summed so far
    total = total * rescale + sum e^(s - peak')
    p[:] = e^(s - peak') * value_scale

A block wholly beyond the row's position leaves peak and total and makes p zero, rescale one.
"""

import operator

from tvm.script import tirx as T

from schedules.intrin.exp import exp
from schedules.intrin.vector import each, fold, store

PEAK, TOTAL, RESCALE = range(3)  # rows of `state`


def mask(p, block_scale, peaks, i, j, lane, limit):
    score = T.Select(j < limit, p[i, j] * block_scale[0, j], T.min_value("float32"))
    store(p, (i, j), score)
    store(peaks, (lane,), T.max(peaks[lane], p[i, j]))


def weigh(p, block_scale, peaks, sums, i, j, lane, limit):
    weight = T.bind(T.Select(j < limit, exp(p[i, j] - peaks[0]), T.float32(0)))
    store(sums, (lane,), sums[lane] + weight)
    store(p, (i, j), weight * block_scale[1, j])


@T.inline
def softmax_step(p, block_scale, state, i, seen, keys, lanes):
    """Query i's scores p[i, :keys], of which the first `seen` count, become probabilities."""
    peaks = T.alloc_buffer((lanes,), "float32", scope="local")
    sums = T.alloc_buffer((lanes,), "float32", scope="local")
    limit: T.let = T.cast(T.max(T.min(seen, T.int64(keys)), T.int64(0)), "int32")

    for lane in T.vectorized(lanes):
        peaks[lane] = state[PEAK, i]
        sums[lane] = T.float32(0)
    each(keys, lanes, lambda j, lane: mask(p, block_scale, peaks, i, j, lane, limit))
    fold(lanes, peaks, T.max)

    each(keys, lanes, lambda j, lane: weigh(p, block_scale, peaks, sums, i, j, lane, limit))
    fold(lanes, sums, operator.add)
    state[RESCALE, i] = exp(state[PEAK, i] - peaks[0])
    state[PEAK, i] = peaks[0]
    state[TOTAL, i] = state[TOTAL, i] * state[RESCALE, i] + sums[0]
