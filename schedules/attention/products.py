"""The two products of attention on a block of unpacked rows, in register tiles.

tile | value | bound by
keys | 2 x 4 | 8 accumulators of 16 registers; 6 loads for 8 multiply-adds
values | 2 x V | 2 V accumulators, V <= 6 a divisor of the row's vectors; V loads for 2 V
"""

import operator

from tvm.script import tirx as T

from schedules.intrin.vector import fold

QUERY_TILE = 2
KEY_TILE = 4
MAX_VALUE_VECTORS = 6


def key_product(padded: int, lanes: int):
    """p[first : first + tile, :count] = q . block, in whole key tiles: the last may run over."""

    @T.inline
    def multiply_keys(q, block, p, first, tile, count):
        sums = T.alloc_buffer((QUERY_TILE * KEY_TILE * lanes,), "float32", scope="local")
        one = T.alloc_buffer((lanes,), "float32", scope="local")
        for j0 in T.serial(T.ceildiv(count, KEY_TILE)):
            for a in T.unroll(tile * KEY_TILE):
                for lane in T.vectorized(lanes):
                    sums[a * lanes + lane] = T.float32(0)
            for d0 in T.serial(padded // lanes):
                for a in T.unroll(tile):
                    for j in T.unroll(KEY_TILE):
                        for lane in T.vectorized(lanes):
                            sums[(a * KEY_TILE + j) * lanes + lane] += (
                                q[first + a, d0 * lanes + lane]
                                * block[j0 * KEY_TILE + j, d0 * lanes + lane]
                            )
            for a in T.unroll(tile):
                for j in T.unroll(KEY_TILE):
                    for lane in T.vectorized(lanes):
                        one[lane] = sums[(a * KEY_TILE + j) * lanes + lane]
                    fold(lanes, one, operator.add)
                    p[first + a, j0 * KEY_TILE + j] = one[0]

    return multiply_keys


def value_product(padded: int, lanes: int, rescale_row: int):
    """o[first : first + tile] = o * rescale + p[..., :count] . block."""
    vectors = padded // lanes
    chunk = max(v for v in range(1, MAX_VALUE_VECTORS + 1) if vectors % v == 0)

    @T.inline
    def multiply_values(p, block, state, o, first, tile, count):
        sums = T.alloc_buffer((QUERY_TILE * MAX_VALUE_VECTORS * lanes,), "float32", scope="local")
        for d0 in T.serial(vectors // chunk):
            for a in T.unroll(tile):
                for v in T.unroll(chunk):
                    for lane in T.vectorized(lanes):
                        sums[(a * chunk + v) * lanes + lane] = (
                            o[first + a, (d0 * chunk + v) * lanes + lane]
                            * state[rescale_row, first + a]
                        )
            for j in T.serial(count):
                for a in T.unroll(tile):
                    for v in T.unroll(chunk):
                        for lane in T.vectorized(lanes):
                            sums[(a * chunk + v) * lanes + lane] += (
                                p[first + a, j] * block[j, (d0 * chunk + v) * lanes + lane]
                            )
            for a in T.unroll(tile):
                for v in T.unroll(chunk):
                    for lane in T.vectorized(lanes):
                        o[first + a, (d0 * chunk + v) * lanes + lane] = sums[
                            (a * chunk + v) * lanes + lane
                        ]

    return multiply_values
