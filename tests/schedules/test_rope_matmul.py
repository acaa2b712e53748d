"""rope_matmul against numpy: a projection and the rotation behind it in one kernel, bit for bit."""

import functools

import numpy as np
import pytest

from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from tests.schedules.compiled import compiled, params
from tests.schedules.matmul_reference import activations, exact_sum, module, scales, weights
from tests.schedules.test_rope import rotated

HOPPER = pytest.mark.parametrize("target", params([TARGETS["cuda-sm90"]]))
LAYOUT = LAYOUTS["tiles_2bit"]
POSITIONS = 64


@functools.cache
def built(heads, k, target_name):
    target = TARGETS[target_name]
    func = module("rope_matmul", target).kernel(*heads, POSITIONS, k, target)
    return compiled(func, target)


def check(heads, k, m, target):
    queries, keys, dim = heads
    turned, width = queries + keys, (queries + 2 * keys) * dim
    rng = np.random.default_rng(m)
    angle = rng.uniform(-np.pi, np.pi, (POSITIONS, dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    positions = rng.integers(0, POSITIONS, m)
    positions[:1] = POSITIONS - 1
    q, w, (scale, w_scale) = (
        activations("random", m, k, 8),
        weights("random", width, k),
        scales(m, width),
    )
    out = np.full((m, width), np.nan, np.float32)
    args = q, scale, LAYOUT.pack(w), w_scale, cos, sin, positions, out
    found = built(heads, k, target.name)(*args)[-1].reshape(m, queries + 2 * keys, dim)
    qkv = (exact_sum(q, w) * (scale[:, None] * w_scale)).reshape(found.shape)
    rotation = rotated(qkv[:, :turned], cos[positions], sin[positions])
    np.testing.assert_array_equal(found[:, :turned], rotation)
    np.testing.assert_array_equal(found[:, turned:], qkv[:, turned:])


@HOPPER
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 128), (2, 1, 32)])
def test_matches_definition(heads, target):
    for m in (0, 1, 17, 64, 129, 300):
        check(heads, 272, m, target)


@HOPPER
def test_every_tile(target):
    """Rows of both forms: tiles that fill the chip, and more."""
    for m in (500, 1000, 2048):
        check((20, 5, 128), 256, m, target)


@pytest.mark.parametrize("dim, k", [(48, 256), (256, 256), (128, 257)])
def test_refuses(dim, k):
    target = TARGETS["cuda-sm90"]
    kernels = module("rope_matmul", target)
    assert not kernels.is_possible(dim, k)
    with pytest.raises(ValueError, match=f"heads of {dim}, K = {k} asked"):
        kernels.kernel(4, 2, dim, POSITIONS, k, target)
