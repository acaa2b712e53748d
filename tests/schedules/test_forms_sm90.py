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
from tests.schedules.matmul_reference import activations, exact_sum, ones, weights

HOPPER = TARGETS["cuda-sm90"]
SHAPES = [Shape(130, 272), Shape(200, 1424)]  # of fewer chunks than ranks and steps; an odd number
FORMS = [form for shape in SHAPES for form in forms_of(shape, 0, HOPPER)]


@pytest.mark.parametrize("target", params([HOPPER]))
@pytest.mark.parametrize(
    "form", FORMS, ids=lambda f: f"{f.shape.n}x{f.shape.k}-{f.tokens}-{f.ranks}"
)
def test_every_form(form, target):
    end, (n, k) = EPILOGUES["scale"], (form.shape.n, form.shape.k)

    def emit(rows, *tensors):
        sm90.launch(form, rows, end, *tensors)

    run = compiled(sm90.prim_func(form.shape, end, emit), target)
    w = weights("random", n, k)
    packed = LAYOUTS["tiles_2bit"].pack(w)
    for m in (1, form.tokens - 1, form.tokens, 2 * form.tokens + 3):
        q, (scale, w_scale) = activations("random", m, k, 8, seed=m), ones(m, n)
        out = np.full((m, n), np.nan, np.float32)
        np.testing.assert_array_equal(run(q, scale, packed, w_scale, out)[-1], exact_sum(q, w))
