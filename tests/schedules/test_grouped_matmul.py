"""grouped_matmul and grouped_embedding against numpy on the codes before they were packed."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import grouped
from schedules import grouped as layout
from tests.schedules.compiled import ROWS, compiled, every_cpu, params
from tests.schedules.matmul_reference import KINDS, activations, grouped_table, module, scales

EVERY_TARGET = pytest.mark.parametrize("target", params(every_cpu("grouped_matmul")))
BITS = pytest.mark.parametrize("bits", layout.BITS)


@cache
def grouped_matmul(target, n, k, bits):
    return compiled(module("grouped_matmul", target).kernel(n, k, bits, target), target)


def check(target, q, bits, n, kind="random", seed=0):
    m, k = q.shape
    levels, packed = grouped_table(n, k, bits, kind, seed)
    scale, w_scale = scales(m, n, seed)
    acc = q.astype(np.int64) @ levels.T
    assert np.abs(acc).max(initial=0) < 2**31
    out = np.full((m, n), np.nan, np.float32)
    found = grouped_matmul(target, n, k, bits)(q, scale, packed, w_scale, out)[-1]
    np.testing.assert_array_equal(found, acc.astype(np.float32) * (scale[:, None] * w_scale))


def test_both_descriptions_of_a_row_agree():
    assert (layout.GROUP, layout.BITS, layout.LINE) == (grouped.GROUP, grouped.BITS, grouped.LINE)
    assert layout.MAX_GROUP_SCALE == grouped.MAX_GROUP_SCALE
    for bits in layout.BITS:
        most = grouped.largest_k(bits)
        for k in (64, 512, 2560, most // 64 * 64):
            assert layout.row_bytes(k, bits) == grouped.row_bytes(k, bits)
        for k in (60, 512, most // 64 * 64, most // 64 * 64 + 64):
            assert bool(layout.why_not(k, bits)) == bool(grouped.why_not(k, bits))


@EVERY_TARGET
@BITS
@pytest.mark.parametrize("k", [64, 192, 512, 2560])
@pytest.mark.parametrize("n", [3, 65])
def test_shapes(target, bits, k, n):
    for m in (0, 1, 2, 5, 33):
        check(target, activations("random", m, k, 8, m), bits, n, seed=m)


@EVERY_TARGET
@BITS
@pytest.mark.parametrize("kind", KINDS)
def test_extremes(target, bits, kind):
    """The largest sums that int32 holds, and every pair at its largest."""
    k = layout.GROUP * (grouped.largest_k(6) // layout.GROUP)
    for other in ("min", "max", "random"):
        for m in (1, 6):
            check(target, activations(kind, m, k, 8), bits, 9, other)


@EVERY_TARGET
@BITS
@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 60), groups=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape(target, bits, n, groups, m, seed):
    check(target, activations("random", m, 64 * groups, 8, seed), bits, n, seed=seed)


@pytest.mark.parametrize("target", params(every_cpu("grouped_embedding")))
@BITS
@pytest.mark.parametrize("k", [64, 512, 2560])
def test_embedding_is_the_definition(target, bits, k):
    vocab, rng = 300, np.random.default_rng(k)
    levels, packed = grouped_table(vocab, k, bits)
    scale = rng.uniform(1e-4, 1e-2, vocab).astype(np.float32)
    run = compiled(module("grouped_embedding", target).kernel(vocab, k, bits, target), target)
    for m in ROWS:
        tokens = rng.integers(0, vocab, m)
        tokens[:1], tokens[1:2] = vocab - 1, 0
        y = run(tokens, packed, scale, np.full((m, k), np.nan, np.float32))[-1]
        np.testing.assert_array_equal(y, levels[tokens].astype(np.float32) * scale[tokens, None])
