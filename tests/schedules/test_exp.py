"""exp against numpy in float64."""

import numpy as np
import pytest
from tvm.script import tirx as T

from schedules.intrin.exp import HIGHEST, LOWEST, exp
from schedules.intrin.vector import each
from tests.schedules.compiled import EVERY_TARGET, compiled

COUNT = 1_000_003


@T.prim_func(s_tir=True)
def exp_of_each(x: T.Buffer((COUNT,), "float32"), y: T.Buffer((COUNT,), "float32")):
    with T.sblock("root"):

        @T.inline
        def body(i, lane):
            y[i] = exp(x[i])

        each(COUNT, 8, body)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_within_two_ulp(target):
    x = np.linspace(LOWEST, HIGHEST, COUNT, dtype=np.float32)
    y = compiled(exp_of_each, target)(x, np.zeros_like(x))[1]
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(y - exact) / ulp).max() < 2


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_ends(target):
    x = np.zeros(COUNT, np.float32)
    x[:6] = [0, -np.inf, np.finfo(np.float32).min, LOWEST, HIGHEST, 1e30]
    y = compiled(exp_of_each, target)(x, np.zeros_like(x))[1][:6]
    assert y[0] == 1
    assert y[1] == y[2] == y[3] > 0
    assert y[4] == y[5] < np.inf
