"""norm_matmul and its kin against numpy, bit for bit."""

import functools

import numpy as np
import pytest

from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from tests.schedules.compiled import compiled, params
from tests.schedules.matmul_reference import module, scales, weights
from tests.schedules.test_rms_norm import EPS, REFERENCES, norm, rows
from tests.schedules.test_rms_norm_topk import topk_int8

F32, F64 = np.float32, np.float64
EVERY_TARGET = pytest.mark.parametrize("target", params([TARGETS["cuda-sm90"]]))
# One chunk and many, tails of tiles and chunks, several chunks a warp, models
SHAPES = [(1, 4), (16, 128), (100, 260), (321, 2560), (3840, 2560), (2560, 6912), (48, 20000)]


@functools.cache
def built(n, k, quantizer, epilogue, target_name, keep=None):
    target = TARGETS[target_name]
    func = module("norm_matmul", target).kernel(n, k, quantizer, EPS, target, epilogue, keep)
    return compiled(func, target)


@EVERY_TARGET
@pytest.mark.parametrize("epilogue", ["scale", "residual", "glu"])
@pytest.mark.parametrize("quantizer", ["int4", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, quantizer, epilogue, target):
    n, k = shape
    run, layout = built(n, k, quantizer, epilogue, target.name), LAYOUTS["tiles_2bit"]
    gate_w, w = (weights("random", n, k, seed) for seed in (1, 2))
    gain = np.random.default_rng(3).uniform(0.5, 2, k).astype(F32)
    gate_scale, w_scale = scales(n, n)
    for seed in range(3):
        x = rows(6, k, seed)[seed : seed + 1]
        residual = np.random.default_rng(seed).standard_normal((1, n)).astype(F32)
        q, scale = REFERENCES[quantizer](norm(x, gain))
        sums = [(q.astype(np.int64) @ m.T.astype(np.int64)).astype(F32) for m in (gate_w, w)]
        s = scale[:, None] * w_scale
        expected = sums[1] * s
        gate, extra = [], []
        if epilogue == "glu":
            gate = [layout.pack(gate_w), gate_scale]
            g = np.maximum(sums[0] * (scale[:, None] * gate_scale), F32(0))
            expected = g * g * expected
        elif epilogue == "residual":
            extra = [residual]
            expected = (residual.astype(F64) + sums[1].astype(F64) * s.astype(F64)).astype(F32)
        y = np.full((1, n), np.nan, F32)
        found = run(x, gain, *gate, layout.pack(w), w_scale, *extra, y)[-1]
        np.testing.assert_array_equal(found, expected)


def kept_rows(k):
    """Rows to select from: Gaussian, of outliers, of few magnitudes, of one, zeros but a few."""
    rng = np.random.default_rng(k)
    outliers = rng.standard_normal(k) * np.where(rng.random(k) < 0.01, 1000, 1)
    few = rng.choice([-2, -1, -0.5, 0, 0.5, 1, 2], k)
    equal = np.where(rng.random(k) < 0.5, -3, 3)
    some = np.where(np.arange(k) % 40 == 7, 1, 0)
    return [*rows(3, k, seed=k), *(row.astype(F32) for row in (outliers, few, equal, some))]


@EVERY_TARGET
@pytest.mark.parametrize("k, keep", [(4, 1), (128, 64), (260, 1), (260, 259), (2560, 1280)])
def test_keeps_the_largest(k, keep, target):
    """All K columns of the row go into every output of the identity's rows and of random ones."""
    n = 48
    run, w = built(n, k, "int8", "residual", target.name, keep), weights("random", n, k, 1)
    w[:, : min(n, k)] = np.eye(n, min(n, k))
    gain = np.random.default_rng(3).uniform(0.5, 2, k).astype(F32)
    w_scale, packed = scales(n, n)[1], LAYOUTS["tiles_2bit"].pack(w)
    for i, x in enumerate(kept_rows(k)):
        own_gain = gain if i < 4 else np.ones(k, F32)  # magnitudes that tie stay so
        q, scale = topk_int8(norm(x[None], own_gain), keep)
        sums = q.astype(np.int64) @ w.T.astype(np.int64)
        residual = np.random.default_rng(i).standard_normal((1, n)).astype(F32)
        s = (scale[:, None] * w_scale).astype(F64)
        expected = (residual.astype(F64) + sums * s).astype(F32)
        y = np.full((1, n), np.nan, F32)
        np.testing.assert_array_equal(
            run(x[None], own_gain, packed, w_scale, residual, y)[-1], expected
        )


@EVERY_TARGET
def test_roots_between_two_floats(target):
    """Rows of one magnitude, whose squares' mean is as near to the middle as one can choose."""
    k, n = 512, 16
    run, w = built(n, k, "int8", "scale", target.name), np.ones((n, k), np.int8)
    rng = np.random.default_rng(0)
    for size in np.ldexp(1 + rng.integers(0, 1 << 23, 60) * 2.0**-23, rng.integers(-40, 40, 60)):
        x = np.full((1, k), size, F32)
        x[0, 0] *= F32(rng.uniform(0, 4))
        q, scale = REFERENCES["int8"](norm(x, np.ones(k, F32)))
        expected = q.astype(np.int64).sum(1)[:, None].astype(F32) * (
            scale[:, None] * np.ones(n, F32)
        )
        y = np.full((1, n), np.nan, F32)
        packed = LAYOUTS["tiles_2bit"].pack(w)
        found = run(x, np.ones(k, F32), packed, np.ones(n, F32), y)[-1]
        np.testing.assert_array_equal(found, expected)
