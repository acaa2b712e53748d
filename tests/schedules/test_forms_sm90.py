"""Every tile of a prompt's GEMM on Hopper, whichever a launch would take: exact sums."""

import numpy as np
import pytest

from schedules.epilogue import EPILOGUES
from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from schedules.ternary_matmul import sm90
from schedules.ternary_matmul.cuda import Shape
from schedules.ternary_matmul.form_sm90 import forms_of
from tests.schedules.compiled import compiled, params
from tests.schedules.matmul_reference import activations, exact_sum, ones, scales, weights

HOPPER = TARGETS["cuda-sm90"]
SHAPES = [Shape(130, 272), Shape(200, 1424)]  # of fewer chunks than ranks and steps; an odd number
FORMS = [form for shape in SHAPES for form in forms_of(shape, 0, HOPPER)]
WITH_RESIDUAL = [Shape(132, 272), Shape(200, 1424)]  # as above, of rows that cp.async can copy
HOLDING = [f for s in WITH_RESIDUAL for f in forms_of(s, 0, HOPPER) if f.can_hold_extra]
TARGET = pytest.mark.parametrize("target", params([HOPPER]))


def label(form):
    return f"{form.shape.n}x{form.shape.k}-{form.tokens}-{form.ranks}"


def built(form, end, target):
    def emit(rows, *tensors):
        sm90.launch(form, rows, end, *tensors)

    return compiled(sm90.prim_func(form.shape, end, emit), target)


def check(form, epilogue, target, case):
    """case(m, n, sums) -> (scale, w_scale, other tensors, what is to be found)"""
    run, (n, k) = built(form, EPILOGUES[epilogue], target), (form.shape.n, form.shape.k)
    w = weights("random", n, k)
    packed = LAYOUTS["tiles_2bit"].pack(w)
    # One tile's last row and its neighbours, and a tile of few rows behind two whole ones
    for m in (1, form.tokens - 1, form.tokens, 2 * form.tokens + 3):
        q = activations("random", m, k, 8, seed=m)
        scale, w_scale, others, expected = case(m, n, exact_sum(q, w))
        out = np.full((m, n), np.nan, np.float32)
        found = run(q, scale, packed, w_scale, *others, out)[-1]
        np.testing.assert_array_equal(found, expected)


@TARGET
@pytest.mark.parametrize("form", FORMS, ids=label)
def test_every_form(form, target):
    check(form, "scale", target, lambda m, n, sums: (*ones(m, n), [], sums))


def test_forms_that_hold_a_residual():
    """Of one rank, where the stages are large enough: chunks fewer than stages, and more."""
    assert {form.ranks for form in HOLDING} == {1}
    assert len({form.tokens for form in HOLDING}) >= 3
    for shape in WITH_RESIDUAL:
        assert [f.tokens for f in HOLDING if f.shape == shape]
    assert any(form.steps < form.stages - 2 for form in HOLDING)
    assert any(form.steps > form.stages for form in HOLDING)


@TARGET
@pytest.mark.parametrize("form", HOLDING, ids=label)
def test_residual(form, target):
    """The residual lies in the stages: every row, column and token its own number."""

    def case(m, n, sums):
        scale, w_scale = scales(m, n)
        residual = np.random.default_rng(m).permutation(m * n).reshape(m, n).astype(np.float32)
        product = sums.astype(np.float64) * (scale[:, None] * w_scale)
        return scale, w_scale, [residual], (residual + product).astype(np.float32)

    check(form, "residual", target, case)
