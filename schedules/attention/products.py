"""The two products of attention with a block of unpacked rows, in register tiles.

Quantised caches: int16 factors, int32 sums, both exact. 16 bits: float64.

tile   | value | bound by
keys   | 2 x 4 | 8 accumulators of 16 registers; 6 loads for 8 multiply-adds
values | 2 x V | 2 V accumulators, V <= 6 a divisor of the row's vectors; V loads for 2 V
"""

import operator
from itertools import product

from tvm import tirx
from tvm.script import tirx as T

from schedules.intrin.vector import fill, fold, store

QUERY_TILE = 2
KEY_TILE = 4
MAX_VALUE_VECTORS = 6


def multiply_keys(q, block, p, first, tile: int, count, lanes: int) -> None:
    """p[first : first + tile, :count] = q . block, in whole key tiles: the last may run over."""
    dtype = p.dtype
    vectors = block.shape[1] // lanes
    pairs = [*product(range(tile), range(KEY_TILE))]
    sums = [T.alloc_buffer((lanes,), dtype, scope="local") for _ in pairs]
    with T.serial(T.ceildiv(count, KEY_TILE)) as j0:
        for acc in sums:
            fill(lanes, acc, tirx.const(0, dtype))
        with T.serial(vectors) as d0:
            for acc, (a, j) in zip(sums, pairs, strict=True):
                with T.vectorized(lanes) as lane:
                    d = d0 * lanes + lane
                    factors = q[first + a, d], block[j0 * KEY_TILE + j, d]
                    left, right = (T.cast(factor, dtype) for factor in factors)
                    store(acc, (lane,), acc[lane] + left * right)
        for acc, (a, j) in zip(sums, pairs, strict=True):
            fold(lanes, acc, operator.add)
            store(p, (first + a, j0 * KEY_TILE + j), acc[0])


def multiply_values(p, block, state, o, first, tile: int, count, lanes: int) -> None:
    """o[first : first + tile] = o * rescale + (p[..., :count] . block) * unit, o in float64."""
    dtype = p.dtype
    vectors = int(block.shape[1]) // lanes
    chunk = max(v for v in range(1, MAX_VALUE_VECTORS + 1) if vectors % v == 0)
    pairs = [*product(range(tile), range(chunk))]
    sums = [T.alloc_buffer((lanes,), dtype, scope="local") for _ in pairs]
    with T.serial(vectors // chunk) as d0:

        def column(v, lane):
            return (d0 * chunk + v) * lanes + lane

        for acc in sums:
            fill(lanes, acc, tirx.const(0, dtype))
        with T.serial(count) as j:
            for acc, (a, v) in zip(sums, pairs, strict=True):
                with T.vectorized(lanes) as lane:
                    value = T.cast(block[j, column(v, lane)], dtype)
                    store(acc, (lane,), acc[lane] + p[first + a, j] * value)
        for acc, (a, v) in zip(sums, pairs, strict=True):
            i = first + a
            with T.vectorized(lanes) as lane:
                d = column(v, lane)
                weighted = T.cast(acc[lane], "float64") * state.unit[i]
                store(o, (i, d), o[i, d] * state.rescale[i] + weighted)
