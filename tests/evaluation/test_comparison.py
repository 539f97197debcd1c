"""Paired comparisons, Holm's correction, and simulations of what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import ALLOWED, simulate
from benchmarks.verdicts import simulate as simulate_worlds
from plm.evaluation import MIN_USERS, cluster_bootstrap, compare, holm


def test_compare_agrees_with_the_paired_t_test():
    rng = np.random.default_rng(0)
    first = rng.normal(0.7, 0.1, 80)
    second = first - rng.normal(0.02, 0.08, 80)
    test = compare(first, second)
    expected = stats.ttest_rel(first, second)
    assert test.difference == pytest.approx((first - second).mean())
    assert test.p_value == pytest.approx(expected.pvalue, abs=0.01)
    low, high = expected.confidence_interval()
    assert (test.low, test.high) == pytest.approx((low, high), abs=0.002)
    assert compare(second, first).p_value == pytest.approx(test.p_value, abs=0.01)


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.019, 0.021, 0.03, 0.2])
def test_p_value_and_interval_say_the_same(shift: float):
    first = np.random.default_rng(1).normal(shift, 0.07, 50)
    test = compare(first, np.zeros(50))
    assert (test.p_value < 0.05) == (not test.low <= 0 <= test.high)
    assert 0 < test.p_value <= 1
    low, high = cluster_bootstrap(first, num_resamples=10_000)
    assert (test.low, test.high) == pytest.approx((float(low), float(high)), rel=1e-9)


def test_compare_needs_users_and_a_difference():
    few = compare(np.ones(MIN_USERS - 1), np.zeros(MIN_USERS - 1))
    assert few.difference == 1 and math.isnan(few.low) and math.isnan(few.p_value)
    assert math.isnan(compare(np.array([np.nan]), np.array([0.5])).difference)
    same = compare(np.full(20, 0.6), np.full(20, 0.6))
    assert same == (0.0, 0.0, 0.0, 1.0, 20)
    values = np.append(np.linspace(0, 1, 20), np.nan)
    assert compare(values, np.zeros(21)).num_users == 20


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.9])), [1.0, 1.0])
    adjusted = holm(np.array([np.nan, 0.02, np.nan, 0.03]))
    np.testing.assert_allclose(adjusted, [np.nan, 0.04, np.nan, 0.04])
    assert len(holm(np.array([]))) == 0


def test_intervals_cover_the_truth():
    """A fifth of benchmarks/coverage.py; the bounds are widened by what fewer simulations scatter."""
    shares = simulate(num_users=60, simulations=100, resamples=400)
    for name in ("macro", "micro", "gain", "difference"):
        assert ALLOWED[0] - 0.04 <= shares[name] <= 1.0, (name, shares)
    assert shares["rejected"] <= 0.11


@pytest.mark.slow
def test_intervals_cover_the_truth_in_500_simulations():
    for num_users in (20, 60, 200):
        shares = simulate(num_users, simulations=500, resamples=1000)
        for name in ("macro", "micro", "gain", "difference"):
            assert ALLOWED[0] <= shares[name] <= ALLOWED[1], (num_users, name, shares)


@pytest.mark.slow
def test_verdicts_are_right_on_planted_users():
    """LoRe on two data sets of each world; benchmarks/verdicts.py runs more, and more methods."""
    results = simulate_worlds(2, ["LoRe"])
    for (world, _), groups in results.items():
        for group, found in groups.items():
            differ = world == "all differ" or (world, group) == ("only seen users differ", "seen")
            claims = sum(outcome.helps for outcome in found)
            assert claims >= 1 if differ else claims == 0, (world, group)  # one of two: 60 users are not many
            if world == "nobody differs":
                assert all(abs(outcome.gain) <= 0.002 and outcome.loss <= 0.01 for outcome in found)
