"""The two products of attention in bytes by `vpdpbusd`: four products a lane, added into int32.

Keys are unsigned, level + 7, queries signed: 7 * sum(q) is taken off. Weights are unsigned, values
signed; four rows of values are interleaved, so that a lane is four positions of a column.

tile   | value  | bound by
keys   | 4 x 4  | 16 accumulators, 4 keys, a query of 32 registers
values | 4 x 64 | 16 accumulators, 4 quads; four rows interleaved serve the 4 queries
"""

from itertools import product

from tvm.script import tirx as T

from schedules.attention import generic
from schedules.attention.bytes_x86 import ByteProducts
from schedules.attention.products_avx2 import KEYS, row_sums
from schedules.attention.unpack import BIAS
from schedules.attention.unpack_avx512 import byte_unpacker
from schedules.intrin import avx2, avx512

QUERIES = 4
LANES = avx512.LINE


def write_offset(offset, q, i) -> None:
    """offset[i] = 7 * sum(q[i])"""
    bias = T.broadcast(T.uint8(BIAS), LANES)
    sums = T.broadcast(T.int32(0), 16)
    for column in range(0, int(q.shape[1]), LANES):
        codes = avx2.load(q, i, column, lanes=LANES)
        sums = T.bind(avx512.dot_bytes(sums, bias, codes))
    T.buffer_store(offset, avx2.sum_lanes(sums), [i])


def multiply_keys(q, offset, block, p, first, tile: int, count) -> None:
    """p[first : first + tile, :count] = q . block - offset, in whole tiles: the last runs over."""
    pairs = [*product(range(tile), range(KEYS))]
    with T.serial(T.ceildiv(count, KEYS)) as j0:
        sums = dict.fromkeys(pairs, T.broadcast(T.int32(0), 16))
        for column in range(0, int(block.shape[1]), LANES):
            keys = [
                T.bind(avx2.load(block, j0 * KEYS + j, column, lanes=LANES)) for j in range(KEYS)
            ]
            queries = [T.bind(avx2.load(q, first + a, column, lanes=LANES)) for a in range(tile)]
            for a, j in pairs:
                sums[a, j] = T.bind(avx512.dot_bytes(sums[a, j], keys[j], queries[a]))
        for a in range(tile):
            halves = [avx2.halves(sums[a, j], "int32x8") for j in range(KEYS)]
            dots = row_sums([T.bind(low + high) for low, high in halves])
            dots = dots - T.broadcast(offset[first + a], KEYS)
            avx2.store(p, first + a, j0 * KEYS, value=dots, lanes=KEYS)


def pack_weights(weights, p, i) -> None:
    """weights[i] = p[i] as bytes"""
    with T.serial(int(p.shape[1]) // 16) as v:
        found = T.cast(avx2.load(p, i, 16 * v, lanes=16), "uint8x16")
        avx2.store(weights, i, 16 * v, value=found, lanes=16)


def multiply_values(weights, block, state, o, first, tile: int, count, kv_bits: int) -> None:
    """o[first : first + tile] = o * rescale + (p[..., :count] . block) * unit, o in float64. Rows
    past the last position hold what is left there, with p = 0."""
    sums = T.alloc_buffer((4 * tile, 16), "int32", scope="local")
    with T.serial(int(block.shape[1]) // LANES) as v:
        avx2.clear(sums, 4 * tile, "int32", 16)
        with T.serial(T.ceildiv(count, 4)) as t:
            rows = [T.bind(avx2.load(block, 4 * t + i, LANES * v, lanes=LANES)) for i in range(4)]
            quads = [T.reinterpret("int8x64", quad) for quad in avx512.columns_to_quads(rows)]
            for a in range(tile):
                four = T.reinterpret("int32", avx2.load(weights, first + a, 4 * t, lanes=4))
                repeated = T.bind(T.reinterpret("uint8x64", T.broadcast(four, 16)))
                for i, values in enumerate(quads):
                    so_far = avx2.load(sums, 4 * a + i, 0, lanes=16)
                    total = avx512.dot_bytes(so_far, repeated, values)
                    avx2.store(sums, 4 * a + i, 0, value=total, lanes=16)
        for a in range(tile):
            _accumulate(o, sums, state, first + a, a, LANES * v)


def _accumulate(o, sums, state, i, a: int, column) -> None:
    """Columns column : column + 64 of row i; lanes 4i : 4i + 4 of quads e are columns 16i + 4e."""
    quads = [T.bind(avx2.load(sums, 4 * a + e, 0, lanes=16)) for e in range(4)]
    rescale, unit = (T.bind(T.broadcast(s[i], 8)) for s in (state.rescale, state.unit))
    for quarter, e in product(range(4), (0, 2)):
        lanes = [4 * quarter + j for j in range(4)]
        eight = T.Shuffle(quads[e : e + 2], [*lanes, *(16 + lane for lane in lanes)])
        d = column + 16 * quarter + 4 * e
        kept = avx2.load(o, i, d, lanes=8) * rescale
        avx2.store(o, i, d, value=kept + T.cast(eight, "float64x8") * unit, lanes=8)


PRODUCTS = ByteProducts(
    lanes=LANES,
    scores=16,
    key_queries=QUERIES,
    value_queries=QUERIES,
    weights=(generic.KEYS, "uint8"),
    unpacker=byte_unpacker,
    write_offset=write_offset,
    multiply_keys=multiply_keys,
    pack_weights=pack_weights,
    multiply_values=multiply_values,
)
