"""The two products of attention with a block of a quantised cache, on ARMv8.0: int16 sums.

Keys: `smlal`, 8 columns of a query and a key. |level| <= 7, |code| <= 128: 32 products of a lane
are at most 28672, within int16, so 256 columns pass between two widenings. Values: `mla` by
element, 8 columns of a row by the weight of one query. Weights are bytes, |level| <= 7 at 4 bits, 3
at 3 bits but for the bos row: 16 rows, or 32, fit int16. Rows past the last position hold what is
left there, with p = 0.

tile   | value  | bound by
keys   | 2 x 4  | 8 accumulators; 6 loads for 16 products
values | 4 x 16 | 8 accumulators and 4 registers of weights; 16 sums stay in L1 between widenings
"""

from itertools import product

from tvm.script import tirx as T

from schedules.attention.generic import KEYS
from schedules.intrin import neon
from schedules.intrin.lanes import clear, load, splat, store

LANES = 16
QUERY_TILE = 4
KEY_QUERIES, KEY_TILE = 2, 4
COLUMNS_PER_WIDEN = 256
ROWS_PER_WIDEN = {4: 16, 3: 32}
WEIGHTS = 8  # of a register
assert COLUMNS_PER_WIDEN // 8 * 7 * 128 <= 0x7FFF
assert ROWS_PER_WIDEN[4] * 7 * 255 <= 0x7FFF
assert ROWS_PER_WIDEN[3] * 3 * 255 + 255 * 4 <= 0x7FFF


def multiply_keys(q, block, p, first, tile: int, count) -> None:
    """p[first : first + tile, :count] = q . block, in whole key tiles: the last may run over."""
    rows = min(tile, KEY_QUERIES)
    with T.serial(T.ceildiv(count, KEY_TILE)) as j0:
        for a in range(0, tile, rows):
            _key_tile(q, block, p, first + a, rows, j0 * KEY_TILE)


def _key_tile(q, block, p, first, rows: int, j0) -> None:
    pairs = [*product(range(rows), range(KEY_TILE))]
    columns = int(block.shape[1])
    sums = {at: splat("int32", 0, 4) for at in pairs}
    for d0 in range(0, columns, COLUMNS_PER_WIDEN):
        words = {at: splat("int16", 0, 8) for at in pairs}
        for d in range(d0, min(d0 + COLUMNS_PER_WIDEN, columns), LANES):
            keys = [_halves(block, j0 + j, d) for j in range(KEY_TILE)]
            queries = [_halves(q, first + a, d) for a in range(rows)]
            for (a, j), half in product(pairs, range(2)):
                found = neon.multiply_long(queries[a][half], keys[j][half])
                words[a, j] = T.bind(words[a, j] + found)
        for at in pairs:
            sums[at] = T.bind(sums[at] + neon.add_pairs_long(words[at]))
    for a in range(rows):
        fours = [T.bind(neon.add_neighbours(sums[a, j], sums[a, j + 1])) for j in (0, 2)]
        store(p, first + a, j0, value=neon.add_neighbours(*fours), lanes=KEY_TILE)


def _halves(matrix, row, column):
    return neon.halves(T.bind(load(matrix, row, column, lanes=LANES)), "int8x8")


def multiply_values(p, block, state, o, first, tile: int, count, kv_bits: int) -> None:
    """o[first : first + tile] = o * rescale + (p[..., :count] . block) * unit, o in float64."""
    rows = ROWS_PER_WIDEN[kv_bits]
    weights = T.alloc_buffer((tile, KEYS), "int16", scope="local")
    words = T.alloc_buffer((2 * tile, 8), "int16", scope="local")
    sums = T.alloc_buffer((4 * tile, 4), "int32", scope="local")
    for a in range(tile):
        with T.serial(KEYS // WEIGHTS) as c:
            found = T.cast(load(p, first + a, WEIGHTS * c, lanes=WEIGHTS), "int16x8")
            store(weights, a, WEIGHTS * c, value=found, lanes=WEIGHTS)
    with T.serial(int(block.shape[1]) // LANES) as d0:
        clear(sums, 4 * tile, "int32", 4)
        with T.serial(T.ceildiv(count, rows)) as drain:
            clear(words, 2 * tile, "int16", 8)
            with T.serial(rows // WEIGHTS) as c:
                _add_rows(words, weights, block, tile, drain * rows + c * WEIGHTS, LANES * d0)
            for i in range(2 * tile):
                for half, word in enumerate(neon.halves(load(words, i, 0, lanes=8), "int16x4")):
                    total = load(sums, 2 * i + half, 0, lanes=4) + T.cast(word, "int32x4")
                    store(sums, 2 * i + half, 0, value=total, lanes=4)
        for a, v in product(range(tile), range(4)):
            i, d = first + a, LANES * d0 + 4 * v
            weighted = T.cast(load(sums, 4 * a + v, 0, lanes=4), "float64x4")
            kept = load(o, i, d, lanes=4) * T.broadcast(state.rescale[i], 4)
            store(o, i, d, value=kept + weighted * T.broadcast(state.unit[i], 4), lanes=4)


def _add_rows(words, weights, block, tile: int, t, column) -> None:
    """words[2a + h] += rows t .. t + 7 of half h of 16 columns by the weights of query a."""
    so_far = [T.bind(load(words, i, 0, lanes=8)) for i in range(2 * tile)]
    shares = [T.bind(load(weights, a, t, lanes=WEIGHTS)) for a in range(tile)]
    for r in range(WEIGHTS):
        wide = [T.bind(T.cast(half, "int16x8")) for half in _halves(block, t + r, column)]
        for a, half in product(range(tile), range(2)):
            weight = T.Shuffle([shares[a]], [r] * 8)
            so_far[2 * a + half] = T.bind(so_far[2 * a + half] + wide[half] * weight)
    for i, word in enumerate(so_far):
        store(words, i, 0, value=word, lanes=8)
