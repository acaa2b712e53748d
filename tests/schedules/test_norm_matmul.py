"""norm_matmul and its kin against numpy, bit for bit."""

import functools

import numpy as np
import pytest

from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from tests.schedules.compiled import compiled, params
from tests.schedules.matmul_reference import module, scales, weights
from tests.schedules.test_rms_norm import EPS, REFERENCES, norm, rows

F32, F64 = np.float32, np.float64
EVERY_TARGET = pytest.mark.parametrize("target", params([TARGETS["cuda-sm90"]]))
# One chunk and many, tails of tiles and chunks, two rounds, models
SHAPES = [(1, 4), (16, 128), (100, 260), (321, 2560), (3840, 2560), (2560, 6912), (48, 20000)]


@functools.cache
def built(n, k, quantizer, epilogue, target_name):
    target = TARGETS[target_name]
    func = module("norm_matmul", target).kernel(n, k, quantizer, EPS, target, epilogue)
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
