"""exp against numpy, where a softmax needs it."""

import numpy as np
import pytest
from tvm.script import tirx as T

from schedules.intrin.exp import LOWEST, exp
from schedules.intrin.vector import each, store
from tests.schedules.compiled import compiled, every_cpu, params

EVERY_TARGET = pytest.mark.parametrize("target", params(every_cpu("attention")))

COUNT = 1_000_003


@T.prim_func(s_tir=True)
def exp_of_each(x: T.Buffer((COUNT,), "float64"), y: T.Buffer((COUNT,), "float64")):
    with T.sblock("root"):
        each(COUNT, 8, lambda i, lane: store(y, (i,), exp(x[i])))


@EVERY_TARGET
@pytest.mark.parametrize("lowest", [LOWEST, -20.0, -0.5, -1e-9])
def test_relative_error(lowest, target):
    """The definition grants 1e-13; numpy's own error is one ulp, 2.2e-16."""
    x = np.linspace(lowest, 0, COUNT)
    y = compiled(exp_of_each, target)(x, np.zeros_like(x))[1]
    assert np.abs(y / np.exp(x) - 1).max() < 1e-15
    assert y[-1] == 1


@EVERY_TARGET
def test_below_the_lowest(target):
    x = np.zeros(COUNT)
    x[:4] = [-np.inf, np.finfo(np.float64).min, 2 * LOWEST, LOWEST]
    y = compiled(exp_of_each, target)(x, np.zeros_like(x))[1]
    assert (y[:4] == y[3]).all() and 0 < y[3] < 1e-300
