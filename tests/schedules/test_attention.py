"""attention against float64, within a bound that follows from float32.

With u = 2^-24, T keys and exact scores s_t = q . k_t / sqrt(D):
- a score is a sum of D products, of a rounded query and unpacked key, times a scale: its error is
  below e = (D + 4) u max_t sum_d |q_d k_td| / sqrt(D), and subtracting the peak adds 2 u max |s|;
- e^x of an error a in x, and of an exp of 2 ulp, is relatively 2 (a + 2 u), for a << 1;
- a weight meets at most T / 32 + 1 rescalings of 3 ulp, a sum of T positive terms, a product and a
  division: relatively (2 T + 16) u.
Twice that (numerator and total) times sum_t p_t |v_t| bounds the error of an element.
"""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.attention.generic import kernel
from schedules.targets import TARGETS
from tests.schedules import kv_reference
from tests.schedules.compiled import EVERY_TARGET, compiled

F32, F64 = np.float32, np.float64
U = 2.0**-24
SLOTS = 5
#           heads, KV heads, D: groups of 1, 2, 3, 4 and more than a tile of queries
SHAPES = [(4, 2, 16), (3, 3, 64), (4, 1, 128), (6, 2, 40), (40, 1, 16)]
KV_BITS = pytest.mark.parametrize("kv_bits", [16, 4, 3])


@functools.cache
def built(shape, kv_bits, target_name):
    target = TARGETS[target_name]
    return compiled(kernel(*shape, kv_bits, target), target)


def expected(q, kv, positions):
    """q f32[M, H, D], kv f32[M, Hkv, 2, T, D] -> y f64[M, H, D] and the bound of its error."""
    _, heads, dim = q.shape
    group, context = heads // kv.shape[1], kv.shape[3]
    k, v = np.repeat(kv.astype(F64), group, axis=1).swapaxes(0, 2).swapaxes(1, 2)
    seen = np.arange(context) <= positions[:, None, None]
    q = q.astype(F64)[..., None] / np.sqrt(dim)
    scores = np.where(seen, (k @ q)[..., 0], -np.inf)
    sizes = np.where(seen, (np.abs(k) @ np.abs(q))[..., 0], 0).max(-1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    error = 2 * ((dim + 4) * U * sizes + 2 * U * sizes + 2 * U) + (2 * context + 16) * U
    p = p[..., None, :]
    return (p @ v)[..., 0, :], 2 * error[..., None] * (p @ np.abs(v))[..., 0, :]


def filled(shape, kv_bits, context, rng, size=1.0):
    """A cache whose every position is written, by the reference."""
    heads, kv_heads, dim = shape
    codes, scales = kv_reference.empty(kv_bits, SLOTS, context, kv_heads, dim)
    qkv = rng.standard_normal((SLOTS * context, (heads + 2 * kv_heads) * dim)).astype(F32)
    slots, positions = np.divmod(np.arange(SLOTS * context), context)
    kv_reference.append(codes, scales, qkv * F32(size), slots, positions, heads, kv_heads, kv_bits)
    return codes, scales


def check(shape, kv_bits, target, cache, slots, positions, rng, size=1.0):
    heads, kv_heads, dim = shape
    codes, scales = cache
    context = scales.shape[-1] if kv_bits < 16 else codes.shape[-1] // dim
    m = len(slots)
    qkv = (size * rng.standard_normal((m, (heads + 2 * kv_heads) * dim))).astype(F32)
    y = np.full((m, heads * dim), np.nan, F32)
    run = built(shape, kv_bits, target.name)
    *inputs, y = run(qkv, codes, scales, np.asarray(slots), np.asarray(positions), y)
    by_slot = [
        kv_reference.dequantize(codes[s], scales[s], kv_bits, dim, context) for s in range(SLOTS)
    ]
    kv = np.stack([by_slot[s] for s in slots])
    q = qkv[:, : heads * dim].reshape(m, heads, dim)
    exact, bound = expected(q, kv, np.asarray(positions))
    np.testing.assert_array_less(np.abs(y.reshape(exact.shape) - exact), bound + 1e-30)
    np.testing.assert_array_equal(inputs[1], codes)


@pytest.mark.parametrize("target", EVERY_TARGET)
@KV_BITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, kv_bits, target):
    rng = np.random.default_rng(1)
    context = 140
    cache = filled(shape, kv_bits, context, rng)
    for m in (1, 2, 5, 33, 128) if shape is SHAPES[0] else (2, 33):
        for first in (0, context - m):  # prefill, from the start or later
            check(shape, kv_bits, target, cache, [3] * m, np.arange(first, first + m), rng)
    for position in (0, 31, 32, 139):  # decode of every slot, at block ends and apart
        positions = (position + np.arange(SLOTS) * 7) % context
        check(shape, kv_bits, target, cache, np.arange(SLOTS)[::-1].copy(), positions, rng)


@pytest.mark.parametrize("target", EVERY_TARGET)
@given(
    runs=st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 60), st.integers(1, 20)),
        min_size=1,
        max_size=6,
        unique_by=lambda run: run[0],
    ),
    gaps=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_mixed_prefills_and_decodes(target, runs, gaps):
    """Runs of rows of one slot after another, positions rising but not always by one."""
    rng = np.random.default_rng(2)
    slots = np.concatenate([np.full(n, slot) for slot, _, n in runs])
    positions = np.concatenate([first + gaps * np.arange(n) for _, first, n in runs])
    cache = kept_cache()
    check(SHAPES[0], 3, target, cache, slots, positions, rng)


@functools.cache
def kept_cache():
    return filled(SHAPES[0], 3, 130, np.random.default_rng(3))


@pytest.mark.parametrize("target", EVERY_TARGET)
@KV_BITS
def test_long_context(kv_bits, target):
    rng = np.random.default_rng(4)
    shape, context = (2, 1, 16), 4200
    cache = filled(shape, kv_bits, context, rng)
    check(shape, kv_bits, target, cache, [1], [context - 1], rng)
    check(shape, kv_bits, target, cache, [4] * 5, np.arange(4090, 4095), rng)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_sharp_and_flat_scores(target):
    """Scores of hundreds, where all but one weight vanish, and of zero, where all are equal."""
    rng = np.random.default_rng(5)
    cache = filled(SHAPES[0], 4, 100, rng)
    check(SHAPES[0], 4, target, cache, [0] * 9, np.arange(80, 89), rng, size=50.0)
    check(SHAPES[0], 4, target, cache, [0] * 9, np.arange(80, 89), rng, size=0.0)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_unwritten_positions_are_not_read(target):
    """NaN in every float16 beyond the row's position."""
    rng = np.random.default_rng(6)
    shape, seen = (4, 2, 16), 37
    cache = filled(shape, 16, 100, rng)
    codes, scales = (c.copy() for c in cache)
    codes[..., seen * 16 :] = np.nan
    qkv = rng.standard_normal((1, 8 * 16)).astype(F32)
    run = built(shape, 16, target.name)
    where = np.array([2]), np.array([seen - 1])
    y = np.full((1, 64), np.nan, F32)
    clean, dirty = (run(qkv, c, scales, *where, y)[-1] for c in (cache[0], codes))
    np.testing.assert_array_equal(clean, dirty)
