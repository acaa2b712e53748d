"""The whole way, on tiny models: compiled steps against the torch module they come from.

The ternary variants are defined to the last bit: caches and logits are equal. The float baseline
sums float32 in any order, so its logits and its cache are only close.
"""

import numpy as np
import pytest
from compiled_model import KV_BITS, TINY, VARIANTS, CompiledModel, compile_tiny

from runtime import tvm_runtime
from runtime.sampler import Sampler
from schedules.targets import TARGETS, find

PROMPT = np.arange(1, 15) * 37 % TINY.vocab_size
FLOAT_TOLERANCE = 2e-3  # of the largest number: float16 steps of the cache, 1 / 1024, twice


# Every variant on the rows that people get; others differ in kernels, which have their own tests
ALL_VARIANTS = {"generic", find("native").name, find("cuda").name}
CASES = [
    pytest.param(
        target,
        variant,
        marks=pytest.mark.skipif(not spec.runs_here(), reason=f"needs {spec.needs()}"),
    )
    for target, spec in TARGETS.items()
    for variant in (VARIANTS if target in ALL_VARIANTS else ["a4.8-int4"])
]


@pytest.mark.parametrize("target, variant", CASES)
def test_compiled_model(target, variant, tmp_path):
    """One test for a model: compiling it is nearly all of the time."""
    model = compile_tiny(variant, target, tmp_path)
    for kv_bits in KV_BITS:
        check_against_torch(model, kv_bits)
        check_prefill_equals_token_by_token(model, kv_bits)
        check_drawn_tokens(model, kv_bits)


def check_against_torch(model: CompiledModel, kv_bits: int) -> None:
    """A prompt in slot 2, then one step of slots 2 and 0 together."""
    caches, n = model.caches(kv_bits), len(PROMPT)
    prompt = (PROMPT, np.full(n, 2), np.arange(n), np.array([0, n - 1]))
    assert_same(model, model.prefill(caches, *prompt), model.reference_prefill(caches, *prompt))
    step = (np.array([5, 7]), np.array([2, 0]), np.array([n, 0]))
    assert_same(model, model.decode(caches, *step), model.reference_decode(caches, *step))
    for compiled, expected in caches.pairs():
        if model.config.is_ternary or compiled.dtype == np.float16:
            assert_same(model, compiled, expected)


def check_prefill_equals_token_by_token(model: CompiledModel, kv_bits: int) -> None:
    n = len(PROMPT)
    at_once, one_by_one = model.caches(kv_bits), model.caches(kv_bits)
    logits = model.prefill(at_once, PROMPT, [1] * n, range(n), range(n))
    for position, token in enumerate(PROMPT):
        row = model.decode(one_by_one, [token], [1], [position])
        assert_same(model, row[0], logits[position])
    if model.config.is_ternary:
        for a, b in zip(at_once.compiled, one_by_one.compiled, strict=True):
            np.testing.assert_array_equal(model.device.fetch(a), model.device.fetch(b))


def check_drawn_tokens(model: CompiledModel, kv_bits: int) -> None:
    """Steps that draw their token where they run, on a GPU, beside the host's sampler."""
    mailbox, caches = model.device.mailbox(), model.caches(kv_bits)
    if mailbox is None:
        return
    step = f"decode_token_kv{kv_bits}"
    settings = (0.0, 40, 1.0), (1.0, 40, 0.9), (5.0, 200, 1.0), (1.0, 0, 1.0)
    for position, token in enumerate(PROMPT.tolist()):
        sampler = Sampler(*settings[position % len(settings)], seed=position)
        uniform = sampler.draw()
        row = token, 1, position
        mailbox.ask(row, sampler.temperature, sampler.top_k, sampler.top_p, uniform)
        arguments = [*mailbox.tensors, caches.compiled, model.params]
        if position == 0:
            tvm_runtime.fill_pool(caches.vm, step, arguments)
        _, logits = caches.vm[step](*arguments)
        drawn = mailbox.wait()
        expected = model.reference_decode(caches, [token], [1], [position])
        assert_same(model, model.device.fetch(logits), expected)
        if sampler.top_k == 0:
            assert drawn < 0
            continue
        assert 0 <= drawn < TINY.vocab_size
        if model.config.is_ternary:
            assert drawn == sampler.sample(expected[0], uniform)


def assert_same(model: CompiledModel, found: np.ndarray, expected: np.ndarray) -> None:
    if model.config.is_ternary:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=FLOAT_TOLERANCE * abs(expected).max())
