"""rope against numpy, bit for bit."""

import numpy as np
import pytest

from tests.schedules.compiled import ROWS, compiled, every_target
from tests.schedules.matmul_reference import module

EVERY_TARGET = pytest.mark.parametrize("target", every_target("rope"))
POSITIONS = 64


def rotated(x, cos, sin):
    """rotate_half of x f32[M, heads, D]."""
    low, high = np.split(x.astype(np.float64), 2, axis=-1)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([low * c - high * s, high * c + low * s], -1).astype(np.float32)


@EVERY_TARGET
@pytest.mark.parametrize(
    "heads, kv_heads, dim", [(4, 2, 16), (4, 4, 64), (5, 1, 128), (2, 1, 40), (1, 1, 6)]
)
def test_matches_definition(heads, kv_heads, dim, target):
    rng = np.random.default_rng(dim)
    angle = rng.uniform(-np.pi, np.pi, (POSITIONS, dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    run = compiled(module("rope", target).kernel(heads, kv_heads, dim, POSITIONS, target), target)
    for m in ROWS:
        qkv = rng.standard_normal((m, heads + 2 * kv_heads, dim)).astype(np.float32)
        qkv[m // 2 :][:1] *= np.float32(1e30)
        positions = rng.integers(0, POSITIONS, m)
        positions[:1] = POSITIONS - 1
        flat = qkv.reshape(m, (heads + 2 * kv_heads) * dim)
        y = run(flat, cos, sin, positions, np.full_like(flat, np.nan))[-1].reshape(qkv.shape)
        turned = rotated(qkv[:, : heads + kv_heads], cos[positions], sin[positions])
        np.testing.assert_array_equal(y[:, : heads + kv_heads], turned)
        np.testing.assert_array_equal(y[:, heads + kv_heads :], qkv[:, heads + kv_heads :])
