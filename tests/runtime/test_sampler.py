"""The sampler's promises, over random logits with ties among them."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from runtime import RuntimeRefusal, Sampler

# Whole numbers, so that ties are common.
LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.integers(-20, 20).map(float))
TEMPERATURES = st.floats(0.01, 5.0)
SEEDS = st.integers(0, 2**32)


def softmax(logits, temperature):
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return p / p.sum()


@given(LOGITS, TEMPERATURES, SEEDS)
def test_top_k_1_is_greedy(logits, temperature, seed):
    greedy = Sampler(temperature=0).sample(logits)
    assert greedy == int(np.argmax(logits))
    assert Sampler(temperature, top_k=1, top_p=1.0, seed=seed).sample(logits) == greedy


@given(LOGITS, TEMPERATURES, SEEDS)
def test_tiny_top_p_is_greedy(logits, temperature, seed):
    sampler = Sampler(temperature, top_k=0, top_p=1e-9, seed=seed)
    assert sampler.sample(logits) == int(np.argmax(logits))


@given(LOGITS, SEEDS)
def test_tiny_temperature_is_greedy_among_the_best(logits, seed):
    token = Sampler(temperature=1e-310, top_k=0, top_p=1.0, seed=seed).sample(logits)
    assert logits[token] == logits.max()


@given(LOGITS, SEEDS)
def test_seed_reproduces(logits, seed):
    one, two = Sampler(seed=seed), Sampler(seed=seed)
    assert [one.sample(logits) for _ in range(20)] == [two.sample(logits) for _ in range(20)]


@given(LOGITS, TEMPERATURES, st.integers(0, 50), st.floats(0.01, 1.0), SEEDS)
def test_draws_only_from_the_nucleus(logits, temperature, top_k, top_p, seed):
    """The set, found the slow way: sort, cut at k, then at the first sum that reaches p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[:top_k] if top_k else order
    p = softmax(logits[order], temperature)
    sums = np.cumsum(p)
    size = min(int(np.searchsorted(sums, top_p)) + 1, len(order))
    sampler = Sampler(temperature, top_k, top_p, seed)
    tokens, chances = sampler.candidates(logits)
    # Sums in another order differ in the last place, and so may the size of the set by one.
    clear = np.abs(sums - top_p).min() > 1e-12 or top_p == 1
    if clear and top_p < 1:
        assert tokens.tolist() == order[:size]
        np.testing.assert_allclose(chances, p[:size] / p[:size].sum(), rtol=1e-12)
    assert set(tokens.tolist()) <= set(order)
    assert {sampler.sample(logits) for _ in range(20)} <= set(tokens.tolist())


def test_follows_the_distribution():
    logits = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
    sampler = Sampler(temperature=1.0, top_k=0, top_p=1.0, seed=7)
    drawn = np.bincount([sampler.sample(logits) for _ in range(20_000)], minlength=4) / 20_000
    # Five standard deviations of a share of 0.5 among 20 000 draws: 5·√(0.25 / 20 000) = 0.018.
    np.testing.assert_allclose(drawn, [0.5, 0.2, 0.2, 0.1], atol=0.018)


@settings(max_examples=5)
@given(SEEDS)
def test_a_real_vocabulary(seed):
    logits = np.random.default_rng(seed).normal(size=128_256).astype(np.float32)
    tokens, p = Sampler(1.0, top_k=0, top_p=0.5).candidates(logits)
    everything = softmax(logits, 1.0)
    assert everything[tokens].sum() >= 0.5 > everything[tokens[:-1]].sum()
    assert abs(p.sum() - 1) < 1e-9


def test_seed_of_the_system_is_told():
    first = Sampler()
    assert Sampler(seed=first.seed)._generator.random() == first._generator.random()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature: asked for -0.1"),
        ({"temperature": float("nan")}, "temperature: asked for nan"),
        ({"temperature": float("inf")}, "temperature: asked for inf"),
        ({"top_k": -1}, "top-k: asked for -1"),
        ({"top_k": 1.5}, "top-k: asked for 1.5"),
        ({"top_p": 0}, "top-p: asked for 0"),
        ({"top_p": 1.01}, "top-p: asked for 1.01"),
        ({"seed": -1}, "seed: asked for -1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(RuntimeRefusal, match=message):
        Sampler(**options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(value):
    with pytest.raises(RuntimeRefusal, match="logit of token 1 is"):
        Sampler().sample(np.array([0, value, 1], np.float32))
