"""rms_norm_topk_int8 against numpy: codes, scales, columns and counts, bit for bit."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from schedules.targets import TARGETS
from tests.schedules.compiled import (
    ROWS,
    compiled,
    every_cpu,
    every_gpu,
    every_target,
    params,
)
from tests.schedules.matmul_reference import module
from tests.schedules.test_rms_norm import EPS, F32, int8, norm, rows

EVERY_CPU = pytest.mark.parametrize("target", params(every_cpu("rms_norm_topk")))
EVERY_GPU = pytest.mark.parametrize("target", params(every_gpu("rms_norm_topk")))
EVERY_TARGET = pytest.mark.parametrize("target", every_target("rms_norm_topk"))

CASES = [(k, keep) for k in (8, 17, 100, 160) for keep in (1, k // 2, k - 1, k)]
CASES += [(512, 256), (2560, 1280), (6912, 3456), (6912, 6912)]


@functools.cache
def built(k, keep, eps, target_name, *end):
    target = TARGETS[target_name]
    return compiled(module("rms_norm_topk", target).kernel(k, keep, eps, target, *end), target)


def topk_int8(h, keep):
    """A stable sort of -|h| puts ties in rising order of index."""
    q, scale = int8(h)
    kept = np.argsort(-np.abs(h), axis=1, kind="stable")[:, :keep]
    mask = np.zeros(h.shape, bool)
    np.put_along_axis(mask, kept, True, axis=1)
    return np.where(mask, q, 0).astype(np.int8), scale


def check(x, gain, keep, target, eps=EPS):
    (m, k), untouched = x.shape, -7
    outputs = np.full((m, k), 99, np.int8), np.zeros(m, F32)
    lists = np.full((m, k), untouched, np.int32), np.full(m, untouched, np.int32)
    run = built(k, keep, eps, target.name)
    q, scale, index, count = run(x, gain, *outputs, *lists)[2:]
    expected_q, expected_scale = topk_int8(norm(x, gain, eps), keep)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(count, np.count_nonzero(expected_q, axis=1))
    for row in range(m):
        np.testing.assert_array_equal(index[row, : count[row]], np.flatnonzero(expected_q[row]))


@EVERY_TARGET
@pytest.mark.parametrize("k, keep", CASES)
def test_matches_definition(k, keep, target):
    gain = np.random.default_rng(k).uniform(0.5, 2, k).astype(F32)
    for m in ROWS if k == 512 else (1, 5):
        check(rows(m, k, seed=m), gain, keep, target)


@EVERY_GPU
@pytest.mark.parametrize("k, keep", [(8, 1), (17, 8), (160, 159), (2560, 1280), (6912, 3456)])
def test_without_a_list(k, keep, target):
    gain, is_listed = np.random.default_rng(k).uniform(0.5, 2, k).astype(F32), False
    for m in (1, 5, 40):
        x, outputs = rows(m, k, seed=m), (np.full((m, k), 99, np.int8), np.zeros(m, F32))
        q, scale = built(k, keep, EPS, target.name, is_listed)(x, gain, *outputs)[2:]
        expected_q, expected_scale = topk_int8(norm(x, gain, EPS), keep)
        np.testing.assert_array_equal(scale, expected_scale)
        np.testing.assert_array_equal(q, expected_q)


@EVERY_GPU
def test_rows_too_long_to_list(target):
    """Twice, and with ties: columns of few magnitudes."""
    k, rng = 30000, np.random.default_rng(0)
    gain = np.ones(k, F32)
    check(rows(3, k, seed=1), gain, k // 2, target)
    check(rng.choice(F32([-2, -1, 0.5, 1]), (2, k)), gain, k // 3, target)


@EVERY_TARGET
@pytest.mark.parametrize("keep", [1, 25, 50, 99])
def test_ties_go_to_the_lower_index(keep, target):
    """Columns of one of a few magnitudes and either sign; of one; of zero but a few."""
    rng = np.random.default_rng(keep)
    few = rng.choice(F32([-2, -1, -0.5, 0, 0.5, 1, 2]), (20, 100))
    equal = np.where(rng.random((2, 100)) < 0.5, F32(-3), F32(3))
    sparse = np.where(np.arange(100) % 40 == 7, F32(1), F32(0))[None]
    check(np.concatenate([few, equal, sparse]), np.ones(100, F32), keep, target)


@EVERY_TARGET
def test_kept_columns_that_round_to_zero_are_not_listed(target):
    x = np.full((1, 100), 1e-4, F32)
    x[0, 3] = 1
    check(x, np.ones(100, F32), 50, target)


@EVERY_TARGET
@pytest.mark.parametrize("k", [16, 31, 32, 33, 64, 100, 264])
def test_lists_of_every_density(k, target):
    """None, all, the first and the last column, each column alone, and shares between; both with
    ties to take back and without. Vectors of 8, 16 and 32 columns with and without a rest."""
    rng, x = np.random.default_rng(k), np.zeros((20, k), F32)
    x[1] = 1
    x[2, 0] = x[3, -1] = x[4, ::2] = x[5, 1::2] = x[6, k // 2 :] = 1
    for row in range(7, 20):
        x[row] = rng.choice(F32([-1, 0, 1]), k, p=[row / 40, 1 - row / 20, row / 40])
    x = np.concatenate([x, np.eye(k, dtype=F32)])
    for keep in (1, k // 2, k):
        check(x, np.ones(k, F32), keep, target)


@EVERY_TARGET
@given(
    x=arrays(F32, (3, 17), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    keep=st.sampled_from([1, 8, 16, 17]),
)
@settings(max_examples=80, deadline=None)
def test_any_floats(target, x, keep):
    check(x, np.ones(17, F32), keep, target)


@EVERY_TARGET
def test_nan_stays_in_its_row(target):
    """What a broken model computes is unspecified, but nothing beside it is touched."""
    x = rows(3, 100, seed=0)
    x[1, ::7] = np.nan
    outputs = np.zeros((3, 100), np.int8), np.zeros(3, F32)
    lists = np.zeros((3, 100), np.int32), np.zeros(3, np.int32)
    q, scale = built(100, 50, EPS, target.name)(x, np.ones(100, F32), *outputs, *lists)[2:4]
    for row in (0, 2):
        alone = topk_int8(norm(x[row : row + 1], np.ones(100, F32)), 50)
        np.testing.assert_array_equal(q[row], alone[0][0])
        np.testing.assert_array_equal(scale[row], alone[1][0])


@EVERY_CPU
@pytest.mark.parametrize("keep", [50, 100])
def test_codes_of_nan_are_listed_as_they_are(keep, target):
    x = rows(4, 100, seed=0)
    x[1, ::7] = x[2] = x[3, -1] = np.nan
    outputs = np.full((4, 100), 99, np.int8), np.zeros(4, F32)
    lists = np.full((4, 100), -7, np.int32), np.full(4, -7, np.int32)
    run = built(100, keep, EPS, target.name)
    q, _, index, count = run(x, np.ones(100, F32), *outputs, *lists)[2:]
    for row in range(4):
        np.testing.assert_array_equal(index[row, : count[row]], np.flatnonzero(q[row]))


@pytest.mark.parametrize("target", ["generic", "cuda-sm90"])
@pytest.mark.parametrize("keep", [0, 65])
def test_impossible_keep_is_refused(keep, target):
    with pytest.raises(ValueError, match=f"keep {keep} asked, rows have 64 columns"):
        module("rms_norm_topk", TARGETS[target]).kernel(64, keep, EPS, TARGETS[target])
