"""ternary_matmul and ternary_glu_matmul against integer sums in numpy, bit for bit."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from tests.schedules.compiled import NATIVE_TARGETS, every_cpu, every_gpu, every_target, params
from tests.schedules.matmul_reference import (
    KINDS,
    ROWS,
    SHAPES,
    activations,
    exact_sum,
    module,
    ones,
    scales,
    ternary_matmul,
    weights,
)


def layout_of(target) -> str:
    return module("ternary_matmul", target).layout(4, "glu")


EVERY_TARGET = pytest.mark.parametrize("target", every_target("ternary_matmul"))
ACT_BITS = pytest.mark.parametrize("act_bits", (4, 8))


@EVERY_TARGET
@ACT_BITS
@pytest.mark.parametrize("n, k", SHAPES, ids=lambda v: str(v))
def test_shapes(target, act_bits, n, k):
    """The sum with scales of one, then the order of the scales' float32 products."""
    run = ternary_matmul(target, n, k, act_bits, "scale")
    w = weights("random", n, k)
    for m in ROWS:
        q = activations("random", m, k, act_bits, seed=m)
        acc = exact_sum(q, w)
        scale, w_scale = ones(m, n)
        np.testing.assert_array_equal(run((q, scale), w, w_scale), acc)
        scale, w_scale = scales(m, n)
        expected = acc * (scale[:, None] * w_scale)
        np.testing.assert_array_equal(run((q, scale), w, w_scale), expected)


@EVERY_TARGET
@ACT_BITS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(130, 4095), (65, 6912)])
def test_extremes(target, act_bits, kind, n, k):
    run = ternary_matmul(target, n, k, act_bits, "scale")
    for sign in ("plus", "minus", "random"):
        w = weights(sign, n, k)
        for m in (1, 5):
            q = activations(kind, m, k, act_bits)
            scale, w_scale = ones(m, n)
            np.testing.assert_array_equal(run((q, scale), w, w_scale), exact_sum(q, w))


@pytest.mark.parametrize("target", params(every_gpu("ternary_matmul")))
@ACT_BITS
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_of_many_outputs(target, act_bits, kind):
    """Five tiles a multiprocessor: on Hopper, bits times bits."""
    n, k = 8464, 260
    run, w = ternary_matmul(target, n, k, act_bits, "scale"), weights("random", n, k)
    q, (scale, w_scale) = activations(kind, 1, k, act_bits), scales(1, n)
    expected = exact_sum(q, w) * (scale[:, None] * w_scale)
    np.testing.assert_array_equal(run((q, scale), w, w_scale), expected)


@pytest.mark.parametrize("target", params(every_gpu("ternary_matmul")))
@pytest.mark.parametrize("n, k", [(40, 6912), (8464, 272)])
def test_few_tokens(target, n, k):
    """On Hopper: forms for up to 4, 8 and 16 tokens, K shared out unevenly between two blocks; five
    tiles of a block, and tokens that two share (all forms: test_few_sm90.py)."""
    run, w = ternary_matmul(target, n, k, 8, "scale"), weights("random", n, k)
    for m in (2, 4, 5, 8, 9, 15):
        q, (scale, w_scale) = activations("random", m, k, 8, seed=m), scales(m, n)
        expected = exact_sum(q, w) * (scale[:, None] * w_scale)
        np.testing.assert_array_equal(run((q, scale), w, w_scale), expected)


@EVERY_TARGET
@ACT_BITS
@pytest.mark.parametrize("n, k", [(130, 257), (321, 64)])
def test_glu(target, act_bits, n, k):
    run = ternary_matmul(target, n, k, act_bits, "glu")
    w, rng = weights("random", n, k), np.random.default_rng(0)
    for m in (0, 1, 2, 5, 33, 128):
        q, (scale, w_scale) = activations("random", m, k, act_bits, seed=m), scales(m, n)
        gate = rng.standard_normal((m, n)).astype(np.float32)
        gate[:, 64:128] = -np.abs(gate[:, 64:128])  # blocks that need no weights
        gate[::2, :64] = 0
        gate[:, 300:] = -1
        g = np.maximum(gate, np.float32(0))
        expected = (g * g) * (exact_sum(q, w) * (scale[:, None] * w_scale))
        np.testing.assert_array_equal(run((q, scale), w, w_scale, gate), expected)


@pytest.mark.parametrize("target", params([TARGETS["cuda-sm90"]]))
def test_residual(target):
    """The epilogue of `sparse_ternary_matmul` without its list, where the compiler asks for it."""
    n, k = 130, 272
    run, w = ternary_matmul(target, n, k, 8, "residual"), weights("random", n, k)
    for m in (1, 5, 12, 33, 300):
        q, (scale, w_scale) = activations("random", m, k, 8, seed=m), scales(m, n)
        residual = np.random.default_rng(m).standard_normal((m, n)).astype(np.float32)
        product = exact_sum(q, w).astype(np.float64) * (scale[:, None] * w_scale)
        found = run((q, scale), w, w_scale, residual)
        np.testing.assert_array_equal(found, (residual + product).astype(np.float32))


ROWS_BY_GATE = [t for t in every_cpu("ternary_matmul") if layout_of(t) == "rows_256"]


@pytest.mark.parametrize("target", params(ROWS_BY_GATE))
@ACT_BITS
@pytest.mark.parametrize("n, k", [(1700, 8200), (70, 33000)], ids=lambda v: str(v))
def test_rows_by_gate(target, act_bits, n, k):
    """Several strips of rows a thread, and sums to drain; from no live row to all of them."""
    run, rng = ternary_matmul(target, n, k, act_bits, "glu"), np.random.default_rng(0)
    w = np.where(rng.random((n, 1)) < 0.5, weights("random", n, k), np.int8(1))
    for m, live in ((1, 0), (1, 0.3), (1, 1), (3, 0.4), (17, 0.6)):
        q, (scale, w_scale) = activations("random", m, k, act_bits, seed=m), scales(m, n)
        q[0] = -(2 ** (act_bits - 1))
        gate = np.where(rng.random((m, n)) < live, 1, -1) * rng.random((m, n), np.float32)
        g = np.maximum(gate.astype(np.float32), np.float32(0))
        expected = (g * g) * (exact_sum(q, w) * (scale[:, None] * w_scale))
        found = run((q, scale), w, w_scale, gate.astype(np.float32))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("target", params(ROWS_BY_GATE))
@ACT_BITS
def test_rows_behind_a_closed_gate_are_not_multiplied(target, act_bits):
    """Their scales are infinite: 0 * (acc * inf) is not 0, so that a sum taken in vain shows."""
    n, k = 300, 520
    run, rng = ternary_matmul(target, n, k, act_bits, "glu"), np.random.default_rng(0)
    w = weights("random", n, k)
    for m in (1, 2, 5):
        q, (scale, w_scale) = activations("random", m, k, act_bits, seed=m), scales(m, n)
        is_open = rng.random(n) < 0.4
        gate = np.where(is_open, 1, -rng.integers(0, 2, n)) * np.ones((m, 1), np.float32)
        expected = gate.clip(0) * (exact_sum(q, w) * (scale[:, None] * w_scale))
        infinite = np.where(is_open, w_scale, np.float32(np.inf))
        found = run((q, scale), w, infinite, gate.astype(np.float32))
        np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("target", params(every_gpu("ternary_matmul")))
@ACT_BITS
@pytest.mark.parametrize("n, k", [(14000, 80), (2500, 144), (64, 144), (650, 1296)])
def test_forms_for_prompts(target, act_bits, n, k):
    """Rows of weights enough to fill the chip, and not: every form, both sides of small M's."""
    run, w = ternary_matmul(target, n, k, act_bits, "scale"), weights("random", n, k)
    for m in (16, 17, 64, 65, 128, 129, 257, 1000, 2040, 2100):
        q, (scale, w_scale) = activations("random", m, k, act_bits, seed=m), scales(m, n)
        expected = exact_sum(q, w) * (scale[:, None] * w_scale)
        np.testing.assert_array_equal(run((q, scale), w, w_scale), expected)


BATCH = st.tuples(st.integers(1, 40), st.integers(0, 999))  # m, seed


@EVERY_TARGET
@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    act_bits=st.sampled_from((4, 8)),
    batches=st.lists(BATCH, min_size=6, max_size=6),
)
def test_any_shape(target, n, k, act_bits, batches):
    """A shape costs a compilation, a batch nothing: six a shape, and one row, a form of its own."""
    run = ternary_matmul(target, n, k, act_bits, "scale")
    for m, seed in [(1, n), *batches]:
        q, w = activations("random", m, k, act_bits, seed), weights("random", n, k, seed)
        scale, w_scale = ones(m, n)
        np.testing.assert_array_equal(run((q, scale), w, w_scale), exact_sum(q, w))


@pytest.mark.parametrize("target", NATIVE_TARGETS)
@ACT_BITS
@pytest.mark.parametrize("epilogue", ["scale", "glu"])
def test_through_relax(target, act_bits, epilogue):
    """The kernel survives the Relax pipeline, with M symbolic, as the target of a call_tir."""
    n, k = 130, 33
    kernels = module("ternary_matmul", target)
    layout = LAYOUTS[kernels.layout(act_bits, epilogue)]
    builder, m = relax.BlockBuilder(), tvm.tirx.Var("m", "int64")

    def tensor(name, shape, dtype="float32"):
        return relax.Var(name, relax.TensorType(shape, dtype))

    params = [
        tensor("q", (m, k), "int8"),
        tensor("scale", (m,)),
        tensor("w", layout.packed_shape(n, k), "uint8"),
        tensor("w_scale", (n,)),
    ]
    if epilogue == "glu":
        params.append(tensor("gate", (m, n)))
    with builder.function("main", params):
        func = builder.add_func(kernels.kernel(n, k, act_bits, target, epilogue), "matmul")
        with builder.dataflow():
            called = relax.call_tir(func, params, relax.TensorType((m, n), "float32"))
            out = builder.emit_output(called)
        builder.emit_func_output(out)
    built = tvm.compile(builder.get(), target=target.to_tvm())
    vm = relax.VirtualMachine(built, tvm.cpu())
    w = weights("random", n, k)
    for rows in (1, 2, 5, 33):
        q, (scale, w_scale) = activations("random", rows, k, act_bits, rows), scales(rows, n)
        gate = np.random.default_rng(0).standard_normal((rows, n)).astype(np.float32)
        args = [q, scale, layout.pack(w), w_scale] + [gate] * (epilogue == "glu")
        expected = exact_sum(q, w) * (scale[:, None] * w_scale)
        if epilogue == "glu":
            g = np.maximum(gate, np.float32(0))
            expected = (g * g) * expected
        found = vm["main"](*map(tvm.runtime.tensor, args)).numpy()
        np.testing.assert_array_equal(found, expected)
