"""The two products of attention in bytes: `vpmaddubsw`, unsigned times signed, 32 an instruction.

Keys are unsigned, level + 7 <= 14, queries signed: a pair of products is at most 2 * 14 * 128, and
256 columns (8 of them a lane) 28672, within int16; 7 * sum(q) is taken off. Weights are unsigned,
values signed: a pair of positions is at most 2 * 255 * 7 = 3570, at 3 bits 2 * 255 * 3 = 1530 but
255 * (7 + 3) with the bos row: 8 pairs, or 16, fit int16.

tile   | value  | bound by
keys   | 2 x 4  | 8 accumulators of 16 registers, 4 keys, 2 queries
values | 4 x 32 | queries, columns: 8 accumulators; two rows interleaved serve the 4 queries
"""

from itertools import product

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention import generic
from schedules.attention.bytes_x86 import ByteProducts
from schedules.attention.unpack import BIAS
from schedules.attention.unpack_avx2 import byte_unpacker
from schedules.intrin import avx2

KEY_QUERIES, KEYS = 2, 4
VALUE_QUERIES = 4
LANES = 32
VECTORS_PER_WIDEN = 8  # of a key
PAIRS_PER_DRAIN = {4: 8, 3: 16}
assert VECTORS_PER_WIDEN * 2 * 2 * BIAS * 128 <= 0x7FFF
assert PAIRS_PER_DRAIN[4] * 2 * 255 * 7 <= 0x7FFF
assert PAIRS_PER_DRAIN[3] * 2 * 255 * 3 + 255 * 4 <= 0x7FFF


def write_offset(offset, q, i) -> None:
    """offset[i] = 7 * sum(q[i])"""
    T.buffer_store(offset, T.int32(0), [i])
    with T.serial(int(q.shape[1]) // LANES) as v:
        codes = avx2.load(q, i, LANES * v, lanes=LANES)
        words = avx2.multiply_add_bytes(T.broadcast(T.uint8(BIAS), LANES), codes)
        total = avx2.sum_lanes(avx2.multiply_add_words(words, _ones()))
        T.buffer_store(offset, offset[i] + total, [i])


def multiply_keys(q, offset, block, p, first, tile: int, count) -> None:
    """p[first : first + tile, :count] = q . block - offset, in whole tiles: the last runs over."""
    pairs = [*product(range(tile), range(KEYS))]
    vectors = int(block.shape[1]) // LANES
    with T.serial(T.ceildiv(count, KEYS)) as j0:
        sums: dict[tuple[int, int], Expr] = {}
        for v0 in range(0, vectors, VECTORS_PER_WIDEN):
            words: dict[tuple[int, int], Expr] = {}
            for v in range(v0, min(v0 + VECTORS_PER_WIDEN, vectors)):
                keys = [
                    T.bind(avx2.load(block, j0 * KEYS + j, LANES * v, lanes=LANES))
                    for j in range(KEYS)
                ]
                for a, j in pairs:
                    codes = avx2.load(q, first + a, LANES * v, lanes=LANES)
                    found = avx2.multiply_add_bytes(keys[j], codes)
                    words[a, j] = T.bind(found if v == v0 else avx2.add_words(words[a, j], found))
            for at, word in words.items():
                wide = avx2.multiply_add_words(word, _ones())
                sums[at] = T.bind(sums[at] + wide if v0 else wide)
        for a in range(tile):
            dots = row_sums([sums[a, j] for j in range(KEYS)])
            dots = dots - T.broadcast(offset[first + a], KEYS)
            avx2.store(p, first + a, j0 * KEYS, value=dots, lanes=KEYS)


def _ones():
    return T.broadcast(T.int16(1), 16)


def row_sums(rows: list[Expr]) -> Expr:
    """int32x4: the sum of each of four int32x8"""
    pairs = [T.bind(avx2.add_neighbours(*rows[i : i + 2])) for i in (0, 2)]
    low, high = avx2.halves(T.bind(avx2.add_neighbours(*pairs)), "int32x4")
    return low + high


def pair_weights(pairs, p, i) -> None:
    """pairs[i, t] = bytes p[i, 2t], p[i, 2t + 1], and both again: what vpbroadcastd can load"""
    with T.serial(int(pairs.shape[1]) // 8) as c:
        both = T.bind(avx2.load(p, i, 16 * c, lanes=16))
        even, odd = (T.Shuffle([both], [*range(start, 16, 2)]) for start in (0, 1))
        pair = T.bind(even | T.shift_left(odd, T.broadcast(T.int32(8), 8)))
        pair = pair | T.shift_left(pair, T.broadcast(T.int32(16), 8))
        avx2.store(pairs, i, 8 * c, value=pair, lanes=8)


def multiply_values(pairs, block, state, o, first, tile: int, count, kv_bits: int) -> None:
    """o[first : first + tile] = o * rescale + (p[..., :count] . block) * unit, o in float64."""
    steps = PAIRS_PER_DRAIN[kv_bits]
    words = T.alloc_buffer((2 * tile, 16), "int16", scope="local")
    sums = T.alloc_buffer((tile * 4, 8), "int32", scope="local")
    with T.serial(int(block.shape[1]) // LANES) as v:
        avx2.clear(sums, 4 * tile, "int32", 8)
        with T.serial(T.ceildiv(count, 2 * steps)) as drain:
            avx2.clear(words, 2 * tile, "int16", 16)
            with T.serial(steps) as step:
                t = T.bind(drain * steps + step)
                even = T.bind(avx2.load(block, 2 * t, LANES * v, lanes=LANES))
                odd = T.bind(avx2.load(block, 2 * t + 1, LANES * v, lanes=LANES))
                low = T.bind(avx2.interleave_low(even, odd, LANES))
                high = T.bind(avx2.interleave_high(even, odd, LANES))
                for a in range(tile):
                    weights = T.broadcast(pairs[first + a, t], 8)
                    weights = T.bind(T.reinterpret("uint8x32", weights))
                    for i, values in enumerate((low, high)):
                        found = avx2.multiply_add_bytes(weights, values)
                        so_far = avx2.load(words, 2 * a + i, 0, lanes=16)
                        total = avx2.add_words(so_far, found)
                        avx2.store(words, 2 * a + i, 0, value=total, lanes=16)
            for i in range(2 * tile):
                _widen(sums, words, i)
        for a in range(tile):
            _accumulate(o, sums, state, first + a, a, LANES * v)


def _widen(sums, words, i: int) -> None:
    """sums[2i : 2i + 2] += the halves of words[i]"""
    for half, word in enumerate(avx2.halves(avx2.load(words, i, 0, lanes=16), "int16x8")):
        avx2.add(sums, 2 * i + half, 0, value=T.cast(word, "int32x8"), lanes=8)


def _accumulate(o, sums, state, i, a: int, column) -> None:
    """Columns column : column + 32 of row i; interleaving has exchanged the middle eights."""
    for at, eight in enumerate((0, 16, 8, 24)):
        parts = avx2.halves(avx2.load(sums, 4 * a + at, 0, lanes=8), "int32x4")
        for h, part in enumerate(parts):
            d = column + eight + 4 * h
            kept = avx2.load(o, i, d, lanes=4) * T.broadcast(state.rescale[i], 4)
            weighted = T.cast(part, "float64x4") * T.broadcast(state.unit[i], 4)
            avx2.store(o, i, d, value=kept + weighted, lanes=4)


PRODUCTS = ByteProducts(
    lanes=LANES,
    scores=8,
    key_queries=KEY_QUERIES,
    value_queries=VALUE_QUERIES,
    weights=(generic.KEYS // 2, "int32"),
    unpacker=byte_unpacker,
    write_offset=write_offset,
    multiply_keys=multiply_keys,
    pack_weights=pair_weights,
    multiply_values=multiply_values,
)
