"""The two products of attention with a block of a quantised cache, by `sdot` of int8.

Keys: 16 columns of a query and a key an instruction. Values: four rows of the block are zipped by
bytes, so that an instruction is four positions of four columns by the weights of one query. Weights
are unsigned, p = s + 128 with s an int8, so that with one more row of weights, all 1,

    p . v = s . v + 128 (1 . v)

Rows past the last position hold what is left there, with p = 0: its two terms cancel exactly.

tile   | value  | bound by
keys   | 2 x 4  | 8 accumulators, 6 loads for 8 products
values | 4 x 16 | 20 accumulators (5 rows of weights) and 4 zipped registers of 32
"""

from itertools import product

from tvm.script import tirx as T

from schedules.attention.generic import KEYS, Products
from schedules.intrin import neon
from schedules.intrin.lanes import clear, load, splat, store

LANES = 16
QUERY_TILE = 4
KEY_QUERIES, KEY_TILE = 2, 4
MIDDLE = 128  # of an unsigned byte


def multiply_keys(q, block, p, first, tile: int, count) -> None:
    """p[first : first + tile, :count] = q . block, in whole key tiles: the last may run over."""
    rows = min(tile, KEY_QUERIES)
    with T.serial(T.ceildiv(count, KEY_TILE)) as j0:
        for a in range(0, tile, rows):
            _key_tile(q, block, p, first + a, rows, j0 * KEY_TILE)


def _key_tile(q, block, p, first, rows: int, j0) -> None:
    pairs = [*product(range(rows), range(KEY_TILE))]
    sums = {at: splat("int32", 0, 4) for at in pairs}
    for d in range(0, int(block.shape[1]), LANES):
        keys = [T.bind(load(block, j0 + j, d, lanes=LANES)) for j in range(KEY_TILE)]
        queries = [T.bind(load(q, first + a, d, lanes=LANES)) for a in range(rows)]
        for a, j in pairs:
            sums[a, j] = T.bind(neon.dot(sums[a, j], keys[j], queries[a]))
    for a in range(rows):
        halves = [T.bind(neon.add_neighbours(sums[a, j], sums[a, j + 1])) for j in (0, 2)]
        store(p, first + a, j0, value=neon.add_neighbours(*halves), lanes=KEY_TILE)


def multiply_values(p, block, state, o, first, tile: int, count) -> None:
    """o[first : first + tile] = o * rescale + (p[..., :count] . block) * unit, o in float64."""
    weights = T.alloc_buffer((tile, KEYS), "int8", scope="local")
    sums = T.alloc_buffer(((tile + 1) * 4, 4), "int32", scope="local")
    for a in range(tile):
        with T.serial(KEYS // LANES) as c:
            found = load(p, first + a, LANES * c, lanes=LANES) - splat("int32", MIDDLE, LANES)
            store(weights, a, LANES * c, value=T.cast(found, "int8x16"), lanes=LANES)
    with T.serial(int(block.shape[1]) // LANES) as d0:
        clear(sums, (tile + 1) * 4, "int32", 4)
        with T.serial(T.ceildiv(count, 4)) as t:
            rows = [T.bind(load(block, 4 * t + i, LANES * d0, lanes=LANES)) for i in range(4)]
            quads = [_quad(weights, a, t) for a in range(tile)] + [splat("int8", 1, LANES)]
            for v, values in enumerate(neon.transpose(rows)):
                signed = T.reinterpret("int8x16", values)
                for a, quad in enumerate(quads):
                    at = 4 * a + v
                    value = neon.dot(load(sums, at, 0, lanes=4), signed, quad)
                    store(sums, at, 0, value=value, lanes=4)
        for a, v in product(range(tile), range(4)):
            ones = T.shift_left(load(sums, 4 * tile + v, 0, lanes=4), splat("int32", 7, 4))
            weighted = T.cast(load(sums, 4 * a + v, 0, lanes=4) + ones, "float64x4")
            i, d = first + a, LANES * d0 + 4 * v
            kept = load(o, i, d, lanes=4) * T.broadcast(state.rescale[i], 4)
            store(o, i, d, value=kept + weighted * T.broadcast(state.unit[i], 4), lanes=4)


def _quad(weights, a: int, t):
    """int8x16 of the weights of positions 4t .. 4t + 3, over and over"""
    quad = T.bind(T.reinterpret("int32", load(weights, a, 4 * t, lanes=4)))
    return T.bind(T.reinterpret("int8x16", T.broadcast(quad, 4)))


PRODUCTS = Products("int8", "int32", LANES, QUERY_TILE, multiply_keys, multiply_values)
