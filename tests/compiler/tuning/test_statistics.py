"""Gains: found where they are, none in noise alone."""

import numpy as np
import pytest

from compiler.tuning.statistics import gain, rank, spread
from compiler.tuning.tasks import allot


def test_rank_against_the_binomial_table():
    """Order statistics of the 99 % interval of a median; n = 7 has none."""
    assert [rank(n) for n in (1, 7, 8, 20, 41)] == [0, 0, 1, 4, 12]


def test_a_gain_is_found_through_noise_that_both_share():
    """10 % under a machine whose speed changes twofold from round to round."""
    rng = np.random.default_rng(0)
    machine = rng.uniform(1, 2, 41)
    before = machine * rng.normal(1.1, 0.03, 41)
    after = machine * rng.normal(1.0, 0.03, 41)
    assert gain(before, after).is_real and not gain(after, before).is_real
    assert gain(before, after).ratio == pytest.approx(1.1, abs=0.03)


def test_noise_is_seldom_a_gain():
    rng = np.random.default_rng(1)
    found = sum(gain(*rng.lognormal(0, 0.3, (2, 41))).is_real for _ in range(500))
    assert found <= 10  # of 500, at half of 1 %: 2.5 expected


def test_what_is_said_of_a_gain():
    assert str(gain([2.0] * 20, [1.0] * 20)) == "2.00x"
    assert str(gain([1.0] * 20, [2.0] * 20)) == "0.50x"
    assert str(gain([1.0, 1.1] * 10, [1.1, 1.0] * 10)) == "none"
    assert not gain([2.0] * 5, [1.0] * 5).is_real  # too few rounds to say


def test_spread():
    assert spread([1.0] * 9) == 0
    assert spread([0.9, 1.0, 1.1]) == pytest.approx(0.1)


def test_trials_are_shared_out_by_weight():
    weights = {("a",): 6.0, ("b",): 3.0, ("c",): 1.0}
    assert allot(100, weights, {key: 1000 for key in weights}) == {
        ("a",): 60,
        ("b",): 30,
        ("c",): 10,
    }
    assert allot(100, weights, {("a",): 5, ("b",): 1000, ("c",): 1000})[("a",)] == 5
    assert sum(allot(100, weights, {("a",): 5, ("b",): 1000, ("c",): 1000}).values()) == 100
    assert allot(100, weights, dict.fromkeys(weights, 7)) == dict.fromkeys(weights, 7)
    assert sum(allot(2, weights, dict.fromkeys(weights, 7)).values()) == 2
