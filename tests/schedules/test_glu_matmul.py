"""glu_matmul against numpy: gate and up projection in one kernel, bit for bit."""

import functools

import numpy as np
import pytest

from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from tests.schedules.compiled import compiled, params
from tests.schedules.matmul_reference import (
    activations,
    exact_sum,
    module,
    ones,
    scales,
    weights,
)

HOPPER = pytest.mark.parametrize("target", params([TARGETS["cuda-sm90"]]))
LAYOUT = LAYOUTS["tiles_2bit"]
SHAPES = [(1, 16), (65, 48), (130, 272), (512, 640)]


@functools.cache
def built(n, k, target_name):
    target = TARGETS[target_name]
    return compiled(module("glu_matmul", target).kernel(n, k, target), target)


def check(q, gate, w, scale, gate_scale, w_scale, target):
    (m, k), n = q.shape, len(w)
    out = np.full((m, n), np.nan, np.float32)
    packed = (LAYOUT.pack(gate), gate_scale, LAYOUT.pack(w), w_scale)
    found = built(n, k, target.name)(q, scale, *packed, out)[-1]
    g = np.maximum(exact_sum(q, gate) * (scale[:, None] * gate_scale), np.float32(0))
    np.testing.assert_array_equal(found, g * g * (exact_sum(q, w) * (scale[:, None] * w_scale)))


@HOPPER
@pytest.mark.parametrize("n, k", SHAPES)
def test_matches_definition(n, k, target):
    gate, w = weights("random", n, k, seed=1), weights("random", n, k, seed=2)
    for m in (0, 1, 17, 64, 129, 300):
        (scale, gate_scale), (_, w_scale) = scales(m, n), scales(m, n, seed=1)
        q = activations("random", m, k, 8)
        check(q, gate, w, scale, gate_scale, w_scale, target)


@HOPPER
def test_every_tile(target):
    """Rows of every form: as many tiles as fill the chip once, twice, and more."""
    n, k = 6912, 256
    gate, w = weights("random", n, k, seed=1), weights("random", n, k, seed=2)
    for m in (100, 140, 200, 250, 330, 600):
        (scale, gate_scale), (_, w_scale) = scales(m, n), scales(m, n, seed=1)
        check(activations("random", m, k, 4), gate, w, scale, gate_scale, w_scale, target)


@HOPPER
@pytest.mark.parametrize("signs", [("plus", "minus"), ("minus", "plus"), ("plus", "plus")])
def test_largest_sums(signs, target):
    n, k, m = 130, 272, 40
    gate, w = (weights(sign, n, k) for sign in signs)
    scale, w_scale = ones(m, n)
    for kind in ("min", "max"):
        q = activations(kind, m, k, 8)
        check(q, gate, w, scale, np.float32(2.0**-12) * w_scale, w_scale, target)
