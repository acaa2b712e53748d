"""int8_matmul against integer sums in numpy, bit for bit where float32 holds them."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedules.compiled import compiled, every_target
from tests.schedules.matmul_reference import KINDS, activations, module, scales

pytestmark = pytest.mark.parametrize("target", every_target("int8_matmul"))


@cache
def int8_matmul(target, n, k):
    return compiled(module("int8_matmul", target).kernel(n, k, target), target)


def check(target, q, w, seed=0):
    (m, k), n = q.shape, w.shape[0]
    scale, w_scale = scales(m, n, seed)
    acc = (q.astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32).astype(np.float32)
    out = np.full((m, n), np.nan, np.float32)
    found = int8_matmul(target, n, k)(q, scale, w, w_scale, out)[-1]
    np.testing.assert_array_equal(found, acc * (scale[:, None] * w_scale))


@pytest.mark.parametrize("k", [1, 2, 3, 7, 15, 16, 17, 33, 64, 127, 512, 2563])
@pytest.mark.parametrize("n", [3, 65])
def test_shapes(target, n, k):
    for m in (0, 1, 2, 5, 33):
        check(target, activations("random", m, k, 8, m), activations("random", n, k, 8, m + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2560, 8191])
def test_extremes(target, kind, k):
    """Sums to 2**27; their conversion to float32 rounds as numpy's does."""
    for other in ("max", "min", "random"):
        for m in (1, 6):
            check(target, activations(kind, m, k, 8), activations(other, 9, k, 8))


@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 300), m=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape(target, n, k, m, seed):
    for rows in (1, m):
        q, w = activations("random", rows, k, 8, seed), activations("random", n, k, 8, seed + 1)
        check(target, q, w)
