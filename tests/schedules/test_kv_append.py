"""kv_append against numpy, every byte of the cache."""

import functools

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tvm import relax

from schedules.targets import TARGETS
from tests.schedules import kv_reference
from tests.schedules.compiled import NATIVE_TARGETS, ROWS, compiled, every_target
from tests.schedules.matmul_reference import module

EVERY_TARGET = pytest.mark.parametrize("target", every_target("kv_append"))

HEADS, KV_HEADS, SLOTS, CONTEXT = 4, 2, 3, 130
F32 = np.float32


@functools.cache
def built(dim, kv_bits, target_name):
    target = TARGETS[target_name]
    kernel = module("kv_append", target).kernel
    return compiled(kernel(HEADS, KV_HEADS, dim, kv_bits, target), target)


def places(m: int, kind: str, rng) -> tuple[np.ndarray, np.ndarray]:
    """slots and positions of m rows: one prompt from the start, one from later, or all mixed."""
    if kind == "mixed":
        chosen = rng.permutation(SLOTS * CONTEXT)[:m]
        return chosen // CONTEXT, chosen % CONTEXT
    first = 0 if kind == "start" else CONTEXT - m
    return np.full(m, 1), first + np.arange(m)


def check(dim, kv_bits, target, qkv, slots, positions):
    expected = kv_reference.empty(kv_bits, SLOTS, CONTEXT, KV_HEADS, dim, fill=77)
    found = built(dim, kv_bits, target.name)(*expected, qkv, slots, positions)[:2]
    kv_reference.append(*expected, qkv, slots, positions, HEADS, KV_HEADS, kv_bits)
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_array_equal(f, e)


@EVERY_TARGET
@pytest.mark.parametrize("kv_bits", [16, 4, 3])
@pytest.mark.parametrize("dim", [16, 40, 64, 128])
def test_matches_definition(dim, kv_bits, target):
    rng = np.random.default_rng(dim)
    for m in ROWS if dim == 64 else (1, 33):
        qkv = rng.standard_normal((m, (HEADS + 2 * KV_HEADS) * dim)).astype(F32)
        for row, factor in zip(range(1, m), (0, 1e30, 1e-30, 3e4, 1e-4), strict=False):
            qkv[row] *= F32(factor)  # zero, past float16, below it, near its ends
        for kind in ("start", "later", "mixed"):
            check(dim, kv_bits, target, qkv, *places(m, kind, rng))


@EVERY_TARGET
@given(
    qkv=arrays(
        F32, (2, (HEADS + 2 * KV_HEADS) * 16), elements=st.floats(-(2.0**99), 2.0**99, width=32)
    ),
    kv_bits=st.sampled_from([16, 4, 3]),
    position=st.integers(0, CONTEXT - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_floats(target, qkv, kv_bits, position):
    check(16, kv_bits, target, qkv, np.array([2, 0]), np.array([position, 0]))


@EVERY_TARGET
def test_half_floats_round_as_numpy_rounds(target):
    """Every float16, the float32 half-way to the next one, and its neighbours in float32."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    between = (halves + np.append(halves[1:], F32(65536))) / 2
    around = [np.nextafter(between, F32(0)), between, np.nextafter(between, F32(1e6)), halves]
    x = np.concatenate([*around, *np.negative(around)])
    m = CONTEXT
    qkv = np.zeros((m, (HEADS + 2 * KV_HEADS) * 128), F32)
    per_call = m * 2 * KV_HEADS * 128
    for start in range(0, x.size, per_call):
        part = x[start : start + per_call]
        kv = np.resize(part, per_call).reshape(m, -1)
        qkv[:, HEADS * 128 :] = kv
        check(128, 16, target, qkv, np.zeros(m, np.int64), np.arange(m))


@pytest.mark.parametrize("target", NATIVE_TARGETS)
@pytest.mark.parametrize("kv_bits", [16, 4, 3])
def test_in_place_in_a_relax_module(kv_bits, target):
    """As the compiler calls it: symbolic rows and cache, the caller's tensors updated."""
    dim, m = 16, 5
    builder = relax.BlockBuilder()
    rows, slots, size, scale_size = (tvm.tirx.Var(n, "int64") for n in ("m", "s", "b", "t"))
    code_dtype = "float16" if kv_bits == 16 else "uint8"
    args = [
        relax.Var(name, relax.TensorType(shape, dtype))
        for name, shape, dtype in (
            ("codes", (slots, KV_HEADS, 2, size), code_dtype),
            ("scales", (slots, KV_HEADS, 2, scale_size), "float16"),
            ("qkv", (rows, (HEADS + 2 * KV_HEADS) * dim), "float32"),
            ("slots", (rows,), "int64"),
            ("positions", (rows,), "int64"),
        )
    ]
    with builder.function("main", args):
        kernel = module("kv_append", target).kernel
        func = builder.add_func(kernel(HEADS, KV_HEADS, dim, kv_bits, target), "kv_append")
        types = [args[0].ty, args[1].ty]
        out = builder.emit(relax.op.call_tir_inplace(func, args, [0, 1], types))
        builder.emit_func_output(out)
    vm = relax.VirtualMachine(tvm.compile(builder.get(), target=target.to_tvm()), tvm.cpu())
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((m, (HEADS + 2 * KV_HEADS) * dim)).astype(F32)
    where = places(m, "mixed", rng)
    expected = kv_reference.empty(kv_bits, SLOTS, CONTEXT, KV_HEADS, dim)
    tensors = [tvm.runtime.tensor(a) for a in (*expected, qkv, *where)]
    vm["main"](*tensors)
    kv_reference.append(*expected, qkv, *where, HEADS, KV_HEADS, kv_bits)
    for e, f in zip(expected, tensors[:2], strict=True):
        np.testing.assert_array_equal(f.numpy(), e)
