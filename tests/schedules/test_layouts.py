"""Each layout against its definition, weight by weight, and back again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.layouts import LAYOUTS


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)


def rows_2bit(p, n, k):
    return (int(p[n, k // 4]) >> 2 * (k % 4) & 3) - 1


def pair_nibble(p, n, k):
    pair = int(p[n // 64, k // 2, n % 32]) >> (4 if n % 64 >= 32 else 0) & 15
    return (pair % 3 if k % 2 else pair // 3) - 1


def columns_2bit(p, n, k):
    return (int(p[k, n // 128, n % 32]) >> 2 * (n % 128 // 32) & 3) - 1


def columns_256(p, n, k):
    byte = 16 * (n % 16 // 4) + 4 * (n % 64 // 16) + n % 4
    return (int(p[k, n // 256, byte]) >> 2 * (n % 256 // 64) & 3) - 1


def quads_2bit(p, n, k):
    return (int(p[n // 64, k // 4, n % 16 * 4 + k % 4]) >> 2 * (n % 64 // 16) & 3) - 1


def rows_256(p, n, k):
    return (int(p[n, k // 256, k % 64]) >> 2 * (k % 256 // 64) & 3) - 1


def tiles_2bit(p, n, k):
    byte = 64 * (n % 8) + 16 * (k % 16 // 4) + 8 * (k % 128 // 64) + 4 * (n % 16 // 8) + k % 4
    return {0: 0, 1: 1, 3: -1}[int(p[n // 16, k // 128, byte]) >> 2 * (k % 64 // 16) & 3]


def quads_signed(p, n, k):
    field, byte = n % 16 // 4, 16 * (n % 32 // 16) + 4 * (n % 4) + k % 4
    bits = int(p[n // 32, k // 4, byte]) >> 2 * field & 3
    return (0, 1, None, -1)[bits] if field == 3 else bits - 1


def triples_5bit(p, n, k):
    """Bits of a triple where the kernel looks for them: (byte, bit) of each."""
    slot = 8 * (n % 16 // 2) + 2 * (n % 64 // 16) + n % 2
    quad, i = k % 12 // 4, k % 4
    triple, digit = (quad, i) if i < 3 else (3, quad)
    triple += 4 * (k % 24 // 12)
    places = {
        5: ((0, 5), (0, 6), (0, 7), (1, 6), (1, 7)),
        6: ((2, 5), (2, 6), (2, 7), (3, 6), (3, 7)),
        7: ((4, 5), (4, 6), (4, 7), (1, 5), (3, 5)),
    }.get(triple, [(triple, bit) for bit in range(5)])
    line = p[n // 64, k // 24]
    value = sum((int(line[64 * r + slot]) >> bit & 1) << i for i, (r, bit) in enumerate(places))
    return value // (9, 3, 1)[digit] % 3 - 1


ELEMENTS = (
    rows_2bit,
    pair_nibble,
    columns_2bit,
    columns_256,
    quads_2bit,
    rows_256,
    tiles_2bit,
    quads_signed,
    triples_5bit,
)
DEFINITIONS = {f.__name__: f for f in ELEMENTS}
PADDING = dict.fromkeys(DEFINITIONS, 0b01010101) | {
    "pair_nibble": 4 * 17,
    "tiles_2bit": 0,
    "quads_signed": 0b00010101,
    "triples_5bit": np.repeat(np.array([173, 109, 173, 77, 173], np.uint8), 64),
}


@pytest.mark.parametrize("n, k", [(1, 1), (3, 5), (65, 29), (130, 15), (128, 16)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_definition(name, n, k):
    w = weights(n, k)
    packed = LAYOUTS[name].pack(w)
    assert packed.dtype == np.uint8 and packed.flags.c_contiguous
    assert packed.shape == LAYOUTS[name].packed_shape(n, k)
    element = DEFINITIONS[name]
    found = [[element(packed, i, j) for j in range(k)] for i in range(n)]
    np.testing.assert_array_equal(found, w)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_is_zero_weights(name):
    zeros = LAYOUTS[name].pack(np.zeros((1, 1), np.int8))
    assert (zeros == PADDING[name]).all()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), k=st.integers(1, 120), seed=st.integers(0, 9))
@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip(name, n, k, seed):
    w = weights(n, k, seed)
    np.testing.assert_array_equal(LAYOUTS[name].unpack(LAYOUTS[name].pack(w), n, k), w)
