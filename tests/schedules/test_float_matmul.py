"""float_matmul against float64, within the rounding of a sum of K terms."""

import numpy as np
import pytest

from tests.schedules.compiled import compiled, every_target
from tests.schedules.matmul_reference import module

pytestmark = pytest.mark.parametrize("target", every_target("float_matmul"))


@pytest.mark.parametrize("k", [1, 2, 3, 7, 15, 17, 33, 64, 127, 512, 2563])
@pytest.mark.parametrize("n", [1, 65])
def test_shapes(target, n, k):
    run = compiled(module("float_matmul", target).kernel(n, k, target), target)
    rng = np.random.default_rng(k)
    w = rng.standard_normal((n, k)).astype(np.float16)
    for m in (0, 1, 2, 5, 33):
        x = rng.standard_normal((m, k)).astype(np.float32)
        found = run(x, w, np.full((m, n), np.nan, np.float32))[-1]
        exact = x.astype(np.float64) @ w.T.astype(np.float64)
        # K roundings of partial sums, each at most the sum of magnitudes
        bound = np.abs(x) @ np.abs(w.T.astype(np.float32)) * (k + 1) * 2.0**-24
        assert (np.abs(found - exact) <= bound).all()


def test_every_float16(target):
    """One column and x = 1: out is the weight, for all finite ones, subnormals and -0 included."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    w = values[np.isfinite(values)].reshape(-1, 1)
    run = compiled(module("float_matmul", target).kernel(len(w), 1, target), target)
    found = run(np.ones((1, 1), np.float32), w, np.empty((1, len(w)), np.float32))[-1]
    np.testing.assert_array_equal(found[0], w[:, 0].astype(np.float32))
