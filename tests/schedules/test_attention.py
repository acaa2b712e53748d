"""attention against numpy: float64 and exact integers, rounded to float32 once.

Only the order of float64 sums and the last bits of exp are free: relatively some 1e-13. A float32
result then differs in its last bit where the exact one lies that close to a rounding boundary, for
about one element in 1e-13 / 2^-24, half a million; the test grants one in ten thousand.
"""

import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.attention import prompt_sm90, sm90
from schedules.targets import TARGETS
from tests.schedules import kv_reference
from tests.schedules.compiled import compiled, every_target, params
from tests.schedules.matmul_reference import module
from tests.schedules.test_rms_norm import int8

EVERY_TARGET = pytest.mark.parametrize("target", every_target("attention"))

F32, F64 = np.float32, np.float64
SLOTS = 5
# heads, KV heads, D: groups of 1 to 5 and more than a tile of queries; D of one register and many
SHAPES = [
    (4, 2, 16),
    (3, 3, 64),
    (4, 1, 128),
    (6, 2, 40),
    (40, 1, 16),
    (5, 1, 8),
    (2, 1, 256),
    (2, 1, 264),
]
KV_BITS = pytest.mark.parametrize("kv_bits", [16, 4, 3])


@functools.cache
def built(shape, kv_bits, target_name):
    target = TARGETS[target_name]
    return compiled(module("attention", target).kernel(*shape, kv_bits, target), target)


def expected(q, levels, scales, positions):
    """q f32[M, H, D]; of each row's slot, levels f64[M, Hkv, 2, T, D] and scales f16[M, Hkv, 2, T]
    or None at 16 bits -> y f32[M, H, D]."""
    _, heads, dim = q.shape
    group, context = heads // levels.shape[1], levels.shape[3]
    k, v = (np.repeat(levels[:, :, kv], group, axis=1) for kv in (0, 1))
    seen = np.arange(context) <= positions[:, None, None]
    if scales is None:
        scores = (k @ q.astype(F64)[..., None])[..., 0] / np.sqrt(dim)
    else:
        k_scale, v_scale = (np.repeat(scales[:, :, kv], group, axis=1).astype(F64) for kv in (0, 1))
        q8, q_scale = int8(q.reshape(-1, dim))
        dots = (k @ q8.reshape(q.shape).astype(F64)[..., None])[..., 0]
        q_scale = q_scale.reshape(q.shape[:2]).astype(F64)[..., None]
        scores = dots * k_scale * q_scale / np.sqrt(dim)
    scores = np.where(seen, scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    if scales is None:
        weighted = (e[..., None, :] @ v)[..., 0, :]
    else:
        weighted = sum(
            byte_weighted((e * v_scale)[..., t : t + 64], v[..., t : t + 64, :])
            for t in range(0, context, 64)
        )
    return (weighted / e.sum(-1, keepdims=True)).astype(F32)


def byte_weighted(w, v):
    """One block: w f64[M, H, 64] as bytes times v f64[M, H, 64, D]."""
    unit = w.max(-1, keepdims=True) / 255
    p = np.rint(w / np.where(unit > 0, unit, 1))
    return unit * (p[..., None, :] @ v)[..., 0, :]


def filled(shape, kv_bits, context, rng, size=1.0):
    """A cache whose every position is written, by the reference."""
    heads, kv_heads, dim = shape
    codes, scales = kv_reference.empty(kv_bits, SLOTS, context, kv_heads, dim)
    qkv = rng.standard_normal((SLOTS * context, (heads + 2 * kv_heads) * dim)).astype(F32)
    slots, positions = np.divmod(np.arange(SLOTS * context), context)
    kv_reference.append(codes, scales, qkv * F32(size), slots, positions, heads, kv_heads, kv_bits)
    return codes, scales


def check(shape, kv_bits, target, cache, slots, positions, rng, size=1.0, qkv=None, run=None):
    heads, kv_heads, dim = shape
    codes, scales = cache
    m = len(slots)
    if qkv is None:
        qkv = (size * rng.standard_normal((m, (heads + 2 * kv_heads) * dim))).astype(F32)
    y = np.full((m, heads * dim), np.nan, F32)
    run = run or built(shape, kv_bits, target.name)
    *inputs, y = run(qkv, codes, scales, np.asarray(slots), np.asarray(positions), y)
    levels = [kv_reference.levels(codes[slot], kv_bits, dim) for slot in range(SLOTS)]
    q = qkv[:, : heads * dim].reshape(m, heads, dim)
    row_scales = scales[slots] if kv_bits < 16 else None
    exact = expected(q, np.stack(levels)[slots], row_scales, np.asarray(positions))
    found = y.reshape(exact.shape)
    np.testing.assert_array_max_ulp(found, exact, maxulp=1)
    assert np.count_nonzero(found != exact) <= exact.size / 10_000
    np.testing.assert_array_equal(inputs[1], codes)


@EVERY_TARGET
@KV_BITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, kv_bits, target):
    rng = np.random.default_rng(1)
    context = 140
    cache = filled(shape, kv_bits, context, rng)
    for m in (1, 2, 3, 5, 8, 16, 17, 33, 128) if shape is SHAPES[0] else (2, 33):
        for first in (0, context - m):  # prefill, from the start or later
            check(shape, kv_bits, target, cache, [3] * m, np.arange(first, first + m), rng)
    for position in (0, 63, 64, 139):  # decode of every slot, at block ends and apart
        positions = (position + np.arange(SLOTS) * 7) % context
        check(shape, kv_bits, target, cache, np.arange(SLOTS)[::-1].copy(), positions, rng)


@EVERY_TARGET
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


# Tiles of rows that share heads' keys: groups of 1, 3 (which leaves rows of a tile idle) and 5
TILED = [(4, 1, 128), (2, 2, 128), (6, 2, 64), (5, 1, 64)]


@EVERY_TARGET
@pytest.mark.parametrize("kv_bits", [4, 3])
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_prompts_of_several_slots(shape, kv_bits, target):
    """Runs that begin and end within tiles, far apart in the context; a slot that comes again."""
    rng = np.random.default_rng(9)
    context = 300
    cache = filled(shape, kv_bits, context, rng)
    for runs in (
        [(3, 0, 150)],
        [(1, 200, 37)],
        [(0, 5, 9), (2, 290, 10), (4, 63, 40), (1, 0, 1), (3, 299, 1), (0, 100, 30)],
        [(slot, 130 + slot, 1) for slot in range(SLOTS)] + [(0, 200, 64), (2, 140, 13)],
    ):
        slots = np.concatenate([np.full(n, slot) for slot, _, n in runs])
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in runs])
        check(shape, kv_bits, target, cache, slots, positions, rng)
    positions = np.arange(40, 80)
    for size in (1e-3, 50.0, 1e3):  # flat; sharp
        check(shape, kv_bits, target, cache, [2] * 40, positions, rng, size=size)


@pytest.mark.parametrize("target", params([TARGETS["cuda-sm90"]]))
@pytest.mark.parametrize("form", prompt_sm90.FORMS)
@pytest.mark.parametrize("kv_bits", [4, 3])
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_unpacked_before(shape, kv_bits, form, target):
    """Hopper's kernels for steps of more rows than these: levels of several slots, and of one."""
    launch = functools.partial(prompt_sm90.launch_unpacked, form)
    func = sm90.every_gpu.kernel(*shape, kv_bits, target, launch_many=launch)
    run, rng, context = compiled(func, target), np.random.default_rng(10), 300
    cache = filled(shape, kv_bits, context, rng)
    for runs in (
        [(3, 0, 150)],
        [(0, 5, 9), (2, 290, 10), (4, 63, 40), (1, 0, 1), (3, 299, 1), (0, 100, 30)],
    ):
        slots = np.concatenate([np.full(n, slot) for slot, _, n in runs])
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in runs])
        check(shape, kv_bits, target, cache, slots, positions, rng, run=run)
        check(shape, kv_bits, target, cache, slots, positions, rng, size=1e3, run=run)


@pytest.mark.parametrize("kv_bits", [16, 3])
def test_levels_are_what_a_prompt_takes(kv_bits):
    """As the kernel allocates it, of 3 slots and 130 positions: 3 blocks of 64 each."""
    shape = 4, 2, 64
    levels = sm90.levels(*shape, kv_bits)
    text = sm90.kernel(*shape, kv_bits, TARGETS["cuda-sm90"]).script()
    sizes = re.findall(r"T\.alloc_buffer\(\((num_slots.*),\), \"uint8\"\)", text)
    names = {"num_slots": 3, "scale_size": 130, "T": SimpleNamespace(int64=int)}
    assert {eval(size, names) for size in sizes} == ({9 * levels["bytes"]} if sizes else set())
    assert bool(sizes) == bool(levels["bytes"]) == (kv_bits == 3) and levels["positions"] == 64


@EVERY_TARGET
@KV_BITS
def test_long_context(kv_bits, target):
    rng = np.random.default_rng(4)
    shape, context = (2, 1, 16), 4200
    cache = filled(shape, kv_bits, context, rng)
    check(shape, kv_bits, target, cache, [1], [context - 1], rng)
    check(shape, kv_bits, target, cache, [4] * 5, np.arange(4090, 4095), rng)
    if kv_bits < 16:
        shape = TILED[0]
        cache = filled(shape, kv_bits, context, rng)
        check(shape, kv_bits, target, cache, [4] * 20, np.arange(4100, 4120), rng)


@EVERY_TARGET
def test_sharp_and_flat_scores(target):
    """Scores of hundreds, where all but one weight vanish, and of zero, where all are equal."""
    rng = np.random.default_rng(5)
    cache = filled(SHAPES[0], 4, 100, rng)
    check(SHAPES[0], 4, target, cache, [0] * 9, np.arange(80, 89), rng, size=50.0)
    check(SHAPES[0], 4, target, cache, [0] * 9, np.arange(80, 89), rng, size=0.0)


@EVERY_TARGET
@pytest.mark.parametrize("kv_bits", [4, 3])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("shape", [(2, 1, 264), (2, 1, 128)], ids=str)
def test_largest_sums(shape, kv_bits, signs, target):
    """Every level of the cache at an end of its range and every q8 at 127: narrow sums fill up."""
    rng = np.random.default_rng(7)
    (heads, kv_heads, dim), context = shape, 130
    codes, scales = kv_reference.empty(kv_bits, SLOTS, context, kv_heads, dim)
    qkv = np.ones((context, heads + 2 * kv_heads, dim), F32)
    qkv[:, heads:] *= np.array(signs, F32)[:, None]
    slots = np.full(context, 1)
    qkv = qkv.reshape(context, -1)
    where = slots, np.arange(context)
    kv_reference.append(codes, scales, qkv, *where, heads, kv_heads, kv_bits)
    for m in (1, 5, 20):
        last = np.arange(context - m, context)
        check(shape, kv_bits, target, (codes, scales), slots[:m], last, rng, qkv=qkv[:m])


@EVERY_TARGET
@pytest.mark.parametrize("kv_bits", [4, 3])
def test_split_positions(kv_bits, target):
    """Few rows of several slots, whose shares of the blocks differ and may be empty."""
    rng = np.random.default_rng(8)
    shape, context = SHAPES[0], 330
    cache = filled(shape, kv_bits, context, rng)
    for positions in ([5], [200], [329, 0], [63, 64, 127, 128], [1, 329, 65, 191, 192]):
        slots = np.arange(len(positions))
        check(shape, kv_bits, target, cache, slots, positions, rng)
        check(shape, kv_bits, target, cache, slots, positions, rng, size=30.0)


@EVERY_TARGET
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
