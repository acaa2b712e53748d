"""Packed layouts of ternary weights: where a weight of int8[N, K] lies in the bytes of a kernel.

    layout       | shape u8                 | element
    rows_2bit    | (N, ceil(K/4))           | bits 2i.. of byte j = w[n, 4j+i] + 1
    pair_nibble  | (ceil(N/64), P, 32)      | low nibble of byte j = 3(w[n, 2p]+1) + w[n, 2p+1]+1
                 |                          | for n = 64b+j; high nibble for row 64b+32+j
    columns_2bit | (K, ceil(N/128), 32)     | bits 2f.. of byte j = w[128b+32f+j, k] + 1
    columns_256  | (K, ceil(N/256), 64)     | bits 2f.. of byte 16l+4i+e
                 |                          | = w[256b+64f+16i+4l+e, k] + 1, i, l, e < 4
    quads_2bit   | (ceil(N/64), Q, 64)      | bits 2f.. of byte 4j+i = w[64b+16f+j, 4q+i] + 1
    rows_256     | (64 ceil(N/64),          | bits 2f.. of byte j = w[n, 256c + 64f + j] + 1
                 |  ceil(K/256), 64)        |
    tiles_2bit   | (ceil(N/16),             | bits 2i.. of byte 64g + 16t + 8v + 4h + j
                 |  ceil(K/128), 512)       | = w[16a + 8h + g, 128c + 64v + 16i + 4t + j] & 3
    quads_signed | (ceil(N/32), S, 32)      | bits 2f.. of byte 16h+4r+i = w[n, 4p+i] + 1 for row
                 |                          | n = 32b+16h+4f+r, f < 3; bits 6.. = w[n, 4p+i] & 3
    triples_5bit | (ceil(N/64),             | five bits for three weights: 9(a+1) + 3(b+1) + c+1,
                 |  ceil(K/24), 320)        | see `_triples_5bit_pack`

`tiles_2bit` is the order of the fragments of a tensor core's 16 x 32 operand: 16 bytes a lane are
two 64-column runs (v) of two rows (h), a load of 512 neighbouring bytes a warp. Its codes are two's
complement: as the top bits of a byte they are 64 w.

P = ceil(K/2) rounded up to a multiple of 7, the pairs that an 8-bit sum holds; Q = ceil(K/4)
rounded up to a multiple of 16, the rows of an AMX tile; S = ceil(K/4) rounded up to a multiple of
4, the quads that 16 bytes of activations hold. N and K are padded with zero weights.
Packing combines bytes first and transposes the packed quarter afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PAIR_GROUP = (
    7  # sums of a pair are at most 16 apart from 16, so 7 * 32 fits a byte and 8 * 32 does not
)


@dataclass(frozen=True)
class Layout:
    name: str
    packed_shape: Callable[[int, int], tuple[int, ...]]
    pack: Callable[[np.ndarray], np.ndarray]  # int8[N, K] in {-1, 0, 1} -> uint8[packed_shape]
    unpack: Callable[[np.ndarray, int, int], np.ndarray]  # and back, given n and k


def num_pairs(k: int) -> int:
    """Pairs of columns in `pair_nibble`, a whole number of groups."""
    return -(-k // (2 * PAIR_GROUP)) * PAIR_GROUP


def _padded(w: np.ndarray, multiple_n: int, k: int) -> np.ndarray:
    """w + 1 as bytes, with zero weights up to a multiple of rows and `k` columns."""
    n = -(-w.shape[0] // multiple_n) * multiple_n
    code = np.ones((n, k), np.uint8)
    np.add(w, 1, out=code[: w.shape[0], : w.shape[1]], casting="unsafe")
    return code


def _rows_2bit_shape(n: int, k: int) -> tuple[int, ...]:
    return n, -(-k // 4)


def _rows_2bit_pack(w: np.ndarray) -> np.ndarray:
    n, quads = _rows_2bit_shape(*w.shape)
    code = np.ascontiguousarray(_padded(w, 1, 4 * quads)).view("<u4").reshape(n, quads)
    code |= code >> 6  # codes of bytes 0, 1 and of bytes 2, 3 side by side
    return (code & 0xF | (code >> 12) & 0xF0).astype(np.uint8)


def _rows_2bit_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    code = np.stack([packed >> (2 * i) & 3 for i in range(4)], axis=-1)
    return code.reshape(n, -1)[:, :k].astype(np.int8) - np.int8(1)


def _pair_nibble_shape(n: int, k: int) -> tuple[int, ...]:
    return -(-n // 64), num_pairs(k), 32


def _pair_nibble_pack(w: np.ndarray) -> np.ndarray:
    blocks, pairs, _ = _pair_nibble_shape(*w.shape)
    code = _padded(w, 64, 2 * pairs)
    pair = (3 * code[:, 0::2] + code[:, 1::2]).reshape(blocks, 2, 32, pairs)
    return np.ascontiguousarray((pair[:, 0] | pair[:, 1] << 4).transpose(0, 2, 1))


def _pair_nibble_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    blocks, pairs, _ = packed.shape
    pair = np.stack([packed & 15, packed >> 4]).transpose(1, 0, 3, 2).reshape(blocks * 64, pairs)
    code = np.stack([pair // 3, pair % 3], axis=-1).reshape(blocks * 64, 2 * pairs)
    return code[:n, :k].astype(np.int8) - np.int8(1)


def _columns_2bit_shape(n: int, k: int) -> tuple[int, ...]:
    return k, -(-n // 128), 32


def _columns_2bit_pack(w: np.ndarray) -> np.ndarray:
    k, blocks, _ = _columns_2bit_shape(*w.shape)
    field = _padded(w, 128, k).reshape(blocks, 4, 32, k)
    byte = field[:, 0] | field[:, 1] << 2 | field[:, 2] << 4 | field[:, 3] << 6
    return np.ascontiguousarray(byte.transpose(2, 0, 1))


def _columns_2bit_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    byte = packed.transpose(1, 2, 0)
    code = np.stack([byte >> (2 * f) & 3 for f in range(4)], axis=1)
    return code.reshape(-1, k)[:n].astype(np.int8) - np.int8(1)


def _tiles_2bit_shape(n: int, k: int) -> tuple[int, ...]:
    return -(-n // 16), -(-k // 128), 512


def _tiles_2bit_pack(w: np.ndarray) -> np.ndarray:
    tiles, chunks, _ = _tiles_2bit_shape(*w.shape)
    code = (_padded(w, 16, 128 * chunks) - np.uint8(1)) & np.uint8(3)
    field = code.reshape(tiles, 2, 8, chunks, 2, 4, 4, 4)  # hg cvi tj
    byte = field[..., 0, :, :] | field[..., 1, :, :] << 2
    byte |= field[..., 2, :, :] << 4 | field[..., 3, :, :] << 6
    return np.ascontiguousarray(byte.transpose(0, 3, 2, 5, 4, 1, 6)).reshape(tiles, chunks, 512)


def _tiles_2bit_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    tiles, chunks, _ = packed.shape
    byte = packed.reshape(tiles, chunks, 8, 4, 2, 2, 4).transpose(0, 5, 2, 1, 4, 3, 6)  # hg cv tj
    code = np.stack([byte << (6 - 2 * i) for i in range(4)], axis=5).view(np.int8) >> 6
    return code.reshape(16 * tiles, 128 * chunks)[:n, :k].copy()


def _columns_256_shape(n: int, k: int) -> tuple[int, ...]:
    return k, -(-n // 256), 64


def _columns_256_pack(w: np.ndarray) -> np.ndarray:
    k, blocks, _ = _columns_256_shape(*w.shape)
    field = _padded(w, 256, k).reshape(blocks, 4, 64, k)
    byte = field[:, 0] | field[:, 1] << 2 | field[:, 2] << 4 | field[:, 3] << 6
    order = byte.reshape(blocks, 4, 4, 4, k).transpose(4, 0, 2, 1, 3)  # k, b, l, i, e
    return np.ascontiguousarray(order).reshape(k, blocks, 64)


def _columns_256_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    byte = packed.reshape(k, -1, 4, 4, 4).transpose(1, 3, 2, 4, 0).reshape(-1, 64, k)
    code = np.stack([byte >> (2 * f) & 3 for f in range(4)], axis=1)
    return code.reshape(-1, k)[:n].astype(np.int8) - np.int8(1)


QUAD_GROUP = 16


def num_quads(k: int) -> int:
    """Quads of columns in `quads_2bit`, a whole number of groups."""
    return -(-k // (4 * QUAD_GROUP)) * QUAD_GROUP


def _quads_2bit_shape(n: int, k: int) -> tuple[int, ...]:
    return -(-n // 64), num_quads(k), 64


def _quads_2bit_pack(w: np.ndarray) -> np.ndarray:
    blocks, quads, _ = _quads_2bit_shape(*w.shape)
    field = _padded(w, 64, 4 * quads).reshape(blocks, 4, 16, 4 * quads)
    byte = field[:, 0] | field[:, 1] << 2 | field[:, 2] << 4 | field[:, 3] << 6
    quad = byte.reshape(blocks, 16, quads, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(quad).reshape(blocks, quads, 64)


def _quads_2bit_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    blocks, quads, _ = packed.shape
    byte = packed.reshape(blocks, quads, 16, 4).transpose(0, 2, 1, 3)
    code = np.stack([byte >> (2 * f) & 3 for f in range(4)], axis=1)
    return code.reshape(64 * blocks, 4 * quads)[:n, :k].astype(np.int8) - np.int8(1)


def _rows_256_shape(n: int, k: int) -> tuple[int, ...]:
    return -(-n // 64) * 64, -(-k // 256), 64


def _rows_256_pack(w: np.ndarray) -> np.ndarray:
    n, chunks, _ = _rows_256_shape(*w.shape)
    field = _padded(w, 64, 256 * chunks).reshape(n, chunks, 4, 64)
    return field[:, :, 0] | field[:, :, 1] << 2 | field[:, :, 2] << 4 | field[:, :, 3] << 6


def _rows_256_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    code = np.stack([packed >> (2 * f) & 3 for f in range(4)], axis=2)
    return code.reshape(packed.shape[0], -1)[:n, :k].astype(np.int8) - np.int8(1)


def _quads_signed_shape(n: int, k: int) -> tuple[int, ...]:
    return -(-n // 32), -(-k // 16) * 4, 32


def _quads_signed_pack(w: np.ndarray) -> np.ndarray:
    blocks, quads, _ = _quads_signed_shape(*w.shape)
    field = _padded(w, 32, 4 * quads).reshape(blocks, 2, 4, 4, quads, 4)
    top = field[:, :, 3] - np.uint8(1) & np.uint8(3)
    byte = field[:, :, 0] | field[:, :, 1] << 2 | field[:, :, 2] << 4 | top << 6
    return np.ascontiguousarray(byte.transpose(0, 3, 1, 2, 4)).reshape(blocks, quads, 32)


def _quads_signed_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    blocks, quads, _ = packed.shape
    byte = packed.reshape(blocks, quads, 2, 4, 4).transpose(0, 2, 3, 1, 4)
    code = [byte >> (2 * f) & 3 for f in range(3)]
    field = np.stack([*code, (byte >> 6) + np.uint8(1) & 3], axis=2)
    return field.reshape(32 * blocks, 4 * quads)[:n, :k].astype(np.int8) - np.int8(1)


# Columns of the eight triples of 24: three of a quad each, and the fourths of three quads
TRIPLES = tuple(
    (c + 4 * t, c + 4 * t + 1, c + 4 * t + 2) if t < 3 else (c + 3, c + 7, c + 11)
    for c in (0, 12)
    for t in range(4)
)
TRIPLE_COLUMNS = 24
# Row of a block for each of 64 bytes: two neighbours in 8 bytes belong to the same 16 rows
TRIPLE_ROWS = tuple(16 * (s % 8 // 2) + 2 * (s // 8) + s % 2 for s in range(64))


def _triples_5bit_shape(n: int, k: int) -> tuple[int, ...]:
    return -(-n // 64), -(-k // TRIPLE_COLUMNS), 5 * 64


def _triples_5bit_pack(w: np.ndarray) -> np.ndarray:
    """Byte 64r + s belongs to row TRIPLE_ROWS[s]. Its low five bits are triple r, r < 5; the high
    three bits hold the others: of bytes r = 0, 2 and 4 the low bits of triples 5, 6 and 7; of
    byte 1 bit 3 of triple 7, then bits 3 and 4 of triple 5; of byte 3 bit 4 of triple 7, then bits
    3 and 4 of triple 6."""
    blocks, groups, _ = _triples_5bit_shape(*w.shape)
    code = _padded(w, 64, TRIPLE_COLUMNS * groups).reshape(blocks, 64, groups, TRIPLE_COLUMNS)
    code = code[:, TRIPLE_ROWS]
    t = [9 * code[..., a] + 3 * code[..., b] + code[..., c] for a, b, c in TRIPLES]
    low = [t[5] << 5, (t[7] & 8) << 2, t[6] << 5, (t[7] & 16) << 1, t[7] << 5]
    high = [0, (t[5] & 24) << 3, 0, (t[6] & 24) << 3, 0]
    bytes_ = np.stack([a | b | c for a, b, c in zip(t, low, high, strict=False)])
    return np.ascontiguousarray(bytes_.transpose(1, 3, 0, 2)).reshape(blocks, groups, 320)


def _triples_5bit_unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    blocks, groups, _ = packed.shape
    r = packed.reshape(blocks, groups, 5, 64).transpose(2, 0, 3, 1)
    fifth, sixth = (r[i] >> 5 | r[i + 1] >> 3 & 24 for i in (0, 2))
    seventh = r[4] >> 5 | r[1] >> 2 & 8 | r[3] >> 1 & 16
    code = np.empty((blocks, 64, groups, TRIPLE_COLUMNS), np.int8)
    for columns, triple in zip(TRIPLES, [*(r & 31), fifth, sixth, seventh], strict=True):
        for column, power in zip(columns, (9, 3, 1), strict=True):
            code[:, TRIPLE_ROWS, :, column] = (triple // power % 3 - 1).transpose(1, 0, 2)
    return code.reshape(64 * blocks, TRIPLE_COLUMNS * groups)[:n, :k].copy()


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("rows_2bit", _rows_2bit_shape, _rows_2bit_pack, _rows_2bit_unpack),
        Layout("pair_nibble", _pair_nibble_shape, _pair_nibble_pack, _pair_nibble_unpack),
        Layout("columns_2bit", _columns_2bit_shape, _columns_2bit_pack, _columns_2bit_unpack),
        Layout("columns_256", _columns_256_shape, _columns_256_pack, _columns_256_unpack),
        Layout("quads_2bit", _quads_2bit_shape, _quads_2bit_pack, _quads_2bit_unpack),
        Layout("rows_256", _rows_256_shape, _rows_256_pack, _rows_256_unpack),
        Layout("tiles_2bit", _tiles_2bit_shape, _tiles_2bit_pack, _tiles_2bit_unpack),
        Layout("triples_5bit", _triples_5bit_shape, _triples_5bit_pack, _triples_5bit_unpack),
        Layout("quads_signed", _quads_signed_shape, _quads_signed_pack, _quads_signed_unpack),
    )
}
