"""sample on a GPU against runtime/sampler.py: the same tokens for the same uniform numbers."""

import functools

import numpy as np
import pytest

from runtime.sampler import Sampler
from schedules.sample.cuda import GROUPS, NOT_FINITE, THREADS, TOO_MANY, kernel
from tests.schedules.compiled import compiled, every_gpu, params

pytestmark = pytest.mark.parametrize("target", params(every_gpu("sample")))
VOCAB = 5000


@functools.cache
def built(target):
    return compiled(kernel(VOCAB, target), target)


def drawn(target, logits, temperature, top_k, top_p, uniform) -> np.ndarray:
    m = len(logits)
    settings = [
        np.full(m, value, dtype)
        for value, dtype in ((temperature, "f4"), (top_k, "i4"), (top_p, "f4"))
    ]
    best = np.zeros((m, GROUPS), np.int64)
    return built(target)(logits, *settings, uniform, np.full(m, -9, np.int64), best)[-2]


@pytest.mark.parametrize(
    "top_k, top_p",
    [(40, 0.95), (40, 1.0), (64, 1.0), (65, 1.0), (129, 1.0), (THREADS, 0.5), (1, 1.0), (7, 0.01)],
)
@pytest.mark.parametrize("temperature", [0.0, 0.1, 0.8, 5.0])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_same_tokens(target, temperature, top_k, top_p, kind):
    rng = np.random.default_rng(top_k)
    logits = rng.standard_normal((64, VOCAB)).astype(np.float32) * 4
    if kind == "ties":
        logits = np.rint(logits) * np.float32(0.5) * np.where(logits < 1, 1, -1).astype(np.float32)
        logits[:, rng.integers(0, VOCAB, 3)] = 11
    uniform = rng.random(64)
    found = drawn(target, logits, temperature, top_k, top_p, uniform)
    sampler = Sampler(temperature, top_k, top_p, seed=0)
    expected = [sampler.sample(row, u) for row, u in zip(logits, uniform, strict=True)]
    matched = [f in (e, TOO_MANY) for f, e in zip(found, expected, strict=True)]
    assert all(matched)
    if kind == "normal" and top_k < THREADS:
        assert (found != TOO_MANY).all()


def test_ties_go_to_the_lower_id(target):
    logits, uniform = np.zeros((3, VOCAB), np.float32), np.array([0.0, 0.5, 0.999])
    assert drawn(target, logits, 1.0, 10, 1.0, uniform).tolist() == [0, 5, 9]


def test_what_the_host_must_sample(target):
    rng = np.random.default_rng(0)
    logits, uniform = rng.standard_normal((2, VOCAB)).astype(np.float32), np.array([0.1, 0.9])
    assert drawn(target, logits, 1.0, 0, 1.0, uniform).tolist() == [TOO_MANY] * 2
    assert drawn(target, logits, 1.0, THREADS + 1, 1.0, uniform).tolist() == [TOO_MANY] * 2


def test_no_number(target):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 7], logits[1, 8], logits[2, 9] = np.nan, np.inf, -np.inf
    found = drawn(target, logits, 0.0, 9, 1.0, np.zeros(3))
    assert found.tolist() == [NOT_FINITE, NOT_FINITE, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_nan_of_either_sign_is_refused(target, temperature):
    """As the host does, which takes the first one for the likeliest token."""
    logits = np.random.default_rng(0).standard_normal((2, VOCAB)).astype(np.float32)
    logits[:, 7] = np.copysign(np.float32(np.nan), np.float32([1, -1]))
    assert np.signbit(logits[:, 7]).tolist() == [False, True]
    found = drawn(target, logits, temperature, 9, 1.0, np.zeros(2))
    assert found.tolist() == [NOT_FINITE] * 2
