"""sparse_ternary_matmul from no zeros to nothing but zeros; the index past its count is poison."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedules.compiled import every_target
from tests.schedules.matmul_reference import (
    activations,
    exact_sum,
    ones,
    scales,
    sparse_ternary_matmul,
    weights,
)

pytestmark = pytest.mark.parametrize("target", every_target("sparse_ternary_matmul"))
POISON = 1 << 30  # an index that no kernel may follow


def sparse(q: np.ndarray, zeros: float, seed: int = 0):
    """q with a share of zeros, its index and its count; rows differ in their counts."""
    drop = np.random.default_rng(seed).random(q.shape) < zeros
    q = np.where(drop, 0, q).astype(np.int8)
    index = np.full(q.shape, POISON, np.int32)
    count = np.count_nonzero(q, axis=1).astype(np.int32)
    for row, columns in enumerate(q):
        index[row, : count[row]] = np.flatnonzero(columns)
    return q, index, count


def check(target, q, zeros, w, seed=0):
    """The sum, then the epilogue, both bit for bit."""
    (m, k), n = q.shape, w.shape[0]
    q, index, count = sparse(q, zeros, seed)
    run = sparse_ternary_matmul(target, n, k)
    acc = exact_sum(q, w)
    scale, w_scale = ones(m, n)
    found = run((q, scale, index, count), w, w_scale, np.zeros((m, n), np.float32))
    np.testing.assert_array_equal(found, acc)
    scale, w_scale = scales(m, n)
    residual = np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32) * 100
    found = run((q, scale, index, count), w, w_scale, residual)
    product = acc.astype(np.float64) * (scale[:, None] * w_scale)
    np.testing.assert_array_equal(found, (residual + product).astype(np.float32))


@pytest.mark.parametrize("zeros", [0, 0.5, 0.84, 0.99, 1], ids=lambda z: f"zeros{z}")
@pytest.mark.parametrize("n, k", [(130, 257), (512, 1536), (1, 1), (64, 2), (65, 6912)])
def test_sparsity(target, n, k, zeros):
    for m in (0, 1, 2, 5, 16, 33, 128):
        check(target, activations("random", m, k, 8, m), zeros, weights("random", n, k), m)


@pytest.mark.parametrize("kind", ["max", "min", "ones", "alternating"])
@pytest.mark.parametrize("zeros", [0, 0.7])
def test_extremes(target, kind, zeros):
    for sign in ("plus", "minus"):
        for m in (1, 6):
            check(target, activations(kind, m, 6912, 8), zeros, weights(sign, 65, 6912))


def test_counts_around_a_group(target):
    """Every count from 0 to 20 at once: odd ones, and ones that no group of columns divides."""
    k = 100
    q = np.zeros((21, k), np.int8)
    for m in range(21):
        q[m, np.random.default_rng(m).permutation(k)[:m]] = np.arange(1, m + 1) * 5
    check(target, q, 0, weights("random", 257, k))
    for m in range(21):
        check(target, q[m : m + 1], 0, weights("random", 257, k))


BATCH = st.tuples(st.integers(1, 40), st.floats(0, 1), st.integers(0, 999))  # m, zeros, seed


@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 300), k=st.integers(1, 300), batches=st.lists(BATCH, min_size=6, max_size=6)
)
def test_any_shape(target, n, k, batches):
    """A shape costs a compilation, a batch nothing: six a shape, and one row, a form of its own."""
    for m, zeros, seed in [(1, 0.5, n), *batches]:
        q, w = activations("random", m, k, 8, seed), weights("random", n, k, seed)
        check(target, q, zeros, w, seed)
