"""rms_norm_mask_int8 against numpy: codes and scales of rms_norm_topk_int8, bit for bit."""

import functools

import numpy as np
import pytest

from schedules.targets import TARGETS
from tests.schedules.compiled import compiled, every_gpu, params
from tests.schedules.matmul_reference import module
from tests.schedules.test_rms_norm import EPS, F32, norm, rows
from tests.schedules.test_rms_norm_topk import topk_int8

EVERY_GPU = pytest.mark.parametrize("target", params(every_gpu("rms_norm_mask")))


@functools.cache
def built(k, keep, target_name):
    target = TARGETS[target_name]
    return compiled(module("rms_norm_mask", target).kernel(k, keep, EPS, target), target)


def check(x, gain, keep, target):
    m, k = x.shape
    q, scale = built(k, keep, target.name)(x, gain, np.full((m, k), 99, np.int8), np.zeros(m, F32))[
        2:
    ]
    expected_q, expected_scale = topk_int8(norm(x, gain, EPS), keep)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(q, expected_q)


@EVERY_GPU
@pytest.mark.parametrize("k, keep", [(8, 1), (17, 8), (160, 159), (2560, 1280), (6912, 3456)])
def test_matches_definition(k, keep, target):
    gain = np.random.default_rng(k).uniform(0.5, 2, k).astype(F32)
    for m in (1, 5, 40):
        check(rows(m, k, seed=m), gain, keep, target)


@EVERY_GPU
@pytest.mark.parametrize("keep", [1, 25, 50, 99])
def test_ties_go_to_the_lower_index(keep, target):
    rng = np.random.default_rng(keep)
    few = rng.choice(F32([-2, -1, -0.5, 0, 0.5, 1, 2]), (20, 100))
    equal = np.where(rng.random((2, 100)) < 0.5, F32(-3), F32(3))
    check(np.concatenate([few, equal]), np.ones(100, F32), keep, target)


@pytest.mark.parametrize("keep", [0, 64])
def test_impossible_keep_is_refused(keep):
    target = TARGETS["cuda-sm90"]
    with pytest.raises(ValueError, match=f"keep {keep} asked, rows have 64 columns"):
        module("rms_norm_mask", target).kernel(64, keep, EPS, target)
