"""rms_norm and its quantizers against numpy, bit for bit."""

import functools

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tvm import relax

from schedules.targets import TARGETS
from tests.schedules.compiled import NATIVE_TARGETS, ROWS, compiled, every_target
from tests.schedules.matmul_reference import module

EVERY_TARGET = pytest.mark.parametrize("target", every_target("rms_norm"))

EPS = 1e-5
F32 = np.float32
COLUMNS = (8, 17, 100, 160, 512, 2560, 6912)
E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12])


def norm(x, gain, eps=EPS):
    mean_square = np.square(x.astype(np.float64)).sum(axis=1) / x.shape[1]
    rstd = (1 / np.sqrt(mean_square + np.float64(eps))).astype(F32)
    return x * rstd[:, None] * gain


def int4(h):
    mean = (np.abs(h).astype(np.float64).sum(axis=1) / h.shape[1]).astype(F32)
    beta, sqrt7 = np.maximum(mean, F32(1e-5)), F32(np.sqrt(7.0))
    return np.clip(np.rint(h * (sqrt7 / beta)[:, None]), -8, 7).astype(np.int8), beta / sqrt7


def int8(h):
    gamma = np.maximum(np.abs(h).max(axis=1), F32(1e-5))
    q = np.clip(np.rint(h * (F32(127) / gamma)[:, None]), -128, 127)
    return q.astype(np.int8), gamma / F32(127)


def fp4(h):
    """By search over the grid in exact doubles; where two are equally near, the even mantissa."""
    scale = np.maximum(np.abs(h).max(axis=1), F32(1e-5)) / F32(12)
    y = (np.abs(h) / scale[:, None]).astype(np.float64)
    distance = np.abs(y[..., None] - E2M1_TWICE)
    nearest = distance.argmin(axis=-1)  # the lower of two
    tie = np.take_along_axis(distance, np.minimum(nearest + 1, 7)[..., None], -1)[..., 0]
    odd_tie = (nearest < 7) & (tie == distance.min(axis=-1)) & (nearest % 2 == 1)
    code = E2M1_TWICE[nearest + odd_tie]
    return (code * np.sign(h)).astype(np.int8), scale


REFERENCES = {None: lambda h: (h,), "int4": int4, "int8": int8, "fp4": fp4}


def rows(m: int, k: int, seed: int) -> np.ndarray:
    """Gaussian rows with, where there is room, zero, huge, tiny and subnormal ones among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)).astype(F32)
    special = [F32(0), F32(1e30), F32(1e-30), F32(1e-42), F32(1e-3)]
    for row, factor in zip(range(1, m), special, strict=False):
        x[row] *= factor
    return x


@functools.cache
def built(quantizer, k, target_name):
    target = TARGETS[target_name]
    return compiled(module("rms_norm", target).kernel(quantizer, k, EPS, target), target)


def check(quantizer, target, x, gain):
    expected = REFERENCES[quantizer](norm(x, gain))
    outputs = [np.full_like(e, 99) for e in expected]
    found = built(quantizer, x.shape[1], target.name)(x, gain, *outputs)[2:]
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_array_equal(f, e)


@EVERY_TARGET
@pytest.mark.parametrize(
    "quantizer, k",
    [("int8", k) for k in COLUMNS] + [(q, k) for q in (None, "int4", "fp4") for k in (17, 2560)],
)
def test_matches_definition(quantizer, k, target):
    gain = np.random.default_rng(k).uniform(0.5, 2, k).astype(F32)
    for m in ROWS:
        check(quantizer, target, rows(m, k, seed=m), gain)


@EVERY_TARGET
@pytest.mark.parametrize(
    "quantizer, values, codes",
    [
        ("fp4", [0.5, 1.5, 2.5, 3.5, 5, 7, 10, 12], [0, 2, 2, 4, 4, 8, 8, 12]),
        ("int8", [0.5, 1.5, 2.5, 3.5, 127], [0, 2, 2, 4, 127]),
    ],
)
def test_ties_between_codes(quantizer, values, codes, target):
    """As many columns as the sum of squares makes rstd 1 and the scale 1: every tie is exact."""
    k = round(2 * np.square(values).sum())
    x = np.zeros((1, k), F32)
    x[0, : 2 * len(values)] = [*values, *np.negative(values)]
    run = compiled(module("rms_norm", target).kernel(quantizer, k, 0.0, target), target)
    q, scale = run(x, np.ones(k, F32), np.zeros((1, k), np.int8), np.zeros(1, F32))[2:]
    assert scale[0] == 1
    assert q[0, : 2 * len(values)].tolist() == [*codes, *np.negative(codes)]


@EVERY_TARGET
@given(
    x=arrays(F32, (3, 100), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    quantizer=st.sampled_from([*REFERENCES]),
)
@settings(max_examples=60, deadline=None)
def test_any_floats(target, x, quantizer):
    check(quantizer, target, x, np.ones(100, F32))


@pytest.mark.parametrize("target", NATIVE_TARGETS)
def test_in_a_relax_module(target):
    """As the compiler calls it: one build for every number of rows."""
    rows_, k = tvm.tirx.Var("m", "int64"), 160
    builder = relax.BlockBuilder()
    args = [
        relax.Var("x", relax.TensorType((rows_, k), "float32")),
        relax.Var("gain", relax.TensorType((k,), "float32")),
    ]
    with builder.function("main", args):
        kernel = module("rms_norm", target).kernel("int4", k, EPS, target)
        func = builder.add_func(kernel, "rms_norm_int4")
        types = [relax.TensorType((rows_, k), "int8"), relax.TensorType((rows_,), "float32")]
        builder.emit_func_output(builder.emit(relax.call_tir(func, args, types)))
    vm = relax.VirtualMachine(tvm.compile(builder.get(), target=target.to_tvm()), tvm.cpu())
    gain = np.linspace(0.5, 2, k, dtype=F32)
    for m in ROWS[1:]:
        x = rows(m, k, seed=m)
        found = vm["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(gain))
        for e, f in zip(int4(norm(x, gain)), found, strict=True):
            np.testing.assert_array_equal(f.numpy(), e)


@pytest.mark.parametrize("target", ["generic", "cuda-sm90"])
def test_unknown_quantizer_is_named(target):
    with pytest.raises(ValueError, match="no quantizer 'int2'; has"):
        module("rms_norm", TARGETS[target]).kernel("int2", 64, EPS, TARGETS[target])
