"""The whole way, on tiny models: compiled steps against the torch module they come from.

Integers are equal bit for bit. Logits pass through float32 attention, whose order is free: its
error is a few ulp, which the following quantizer rounds away but for a rare step of a code.
"""

import numpy as np
import pytest
from compiled_model import KV_BITS, TINY, VARIANTS, compile_tiny

from schedules.targets import TARGETS, host_flags

PROMPT = np.arange(1, 15) * 37 % TINY.vocab_size
LOGIT_TOLERANCE = 2e-3  # of the largest logit


@pytest.fixture(scope="module", params=TARGETS)
def target(request) -> str:
    missing = set(TARGETS[request.param].cpu_flags) - host_flags()
    if missing:
        pytest.skip(f"host lacks {' '.join(sorted(missing))} of target {request.param}")
    return request.param


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, target, tmp_path_factory):
    return compile_tiny(request.param, target, tmp_path_factory.mktemp("checkpoint"))


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, atol=LOGIT_TOLERANCE * abs(expected).max())


def assert_same_caches(model, caches) -> None:
    for compiled, expected in caches.pairs():
        if model.config.is_ternary:
            np.testing.assert_array_equal(compiled, expected)
        elif compiled.dtype == np.float16:  # sums of float32 in another order
            np.testing.assert_allclose(compiled, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_matches_torch(model, kv_bits):
    """A prompt in slot 2, then one step of slots 2 and 0 together."""
    caches, n = model.caches(kv_bits), len(PROMPT)
    prompt = (PROMPT, [2] * n, range(n), [0, n - 1])
    prompt = tuple(map(np.asarray, prompt))
    assert_close(model.prefill(caches, *prompt), model.reference_prefill(caches, *prompt))
    step = tuple(map(np.asarray, ([5, 7], [2, 0], [n, 0])))
    assert_close(model.decode(caches, *step), model.reference_decode(caches, *step))
    assert_same_caches(model, caches)


@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_prefill_equals_token_by_token(model, kv_bits):
    n = len(PROMPT)
    at_once, one_by_one = model.caches(kv_bits), model.caches(kv_bits)
    logits = model.prefill(at_once, PROMPT, [1] * n, range(n), range(n))
    for position, token in enumerate(PROMPT):
        row = model.decode(one_by_one, [token], [1], [position])
        assert_close(row[0], logits[position])
    if model.config.is_ternary:
        for a, b in zip(at_once.compiled, one_by_one.compiled, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
