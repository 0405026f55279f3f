"""Intervals against closed forms, brute force and coverage."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trl_bilevel.evaluation import mean, paired_difference, rate, ratio

Z = stats.norm.ppf(0.975)
FAST = {"resamples": 499}


def wilson(k, n):
    centre, half = (k + Z**2 / 2) / (n + Z**2), Z / (n + Z**2) * math.sqrt(k * (n - k) / n + Z**2 / 4)
    return centre - half, centre + half


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_rate_is_wilsons_closed_form(counts):
    found = rate(*counts)
    assert (found.low, found.high) == pytest.approx(wilson(*counts), abs=1e-12)
    assert found.low - 1e-12 <= found.value == counts[0] / counts[1] <= found.high + 1e-12


@pytest.mark.parametrize("n", [12, 60, 200])
def test_rate_covers_the_truth_as_often_as_it_says(n):
    """Exactly, by the binomial distribution: 95% on average over rates, and never below 83%."""
    inside = [(found.low, found.high) for found in (rate(k, n) for k in range(n + 1))]
    coverage = [
        sum(stats.binom.pmf(k, n, p) for k, (low, high) in enumerate(inside) if low <= p <= high)
        for p in np.linspace(0.005, 0.995, 100)
    ]
    assert 0.945 <= np.mean(coverage) <= 0.97
    assert min(coverage) >= 0.83


def test_confidence_widens():
    assert rate(5, 20, confidence=0.99).high > rate(5, 20, confidence=0.9).high
    assert rate(5, 20, confidence=0.9).confidence == 0.9


def covered(make, truth, count=150):
    """Share of intervals that hold the truth."""
    found = [make(np.random.default_rng(number)) for number in range(count)]
    return np.mean([one.low <= truth <= one.high for one in found])


def test_bootstrap_mean_covers_the_truth():
    # 150 intervals of 95%: below 135 or above 149 hits have a probability of under 1% each, were the coverage right.
    assert 0.9 <= covered(lambda rng: mean(rng.gamma(2.0, 1.0, 60), **FAST), 2.0) <= 0.994


def test_ratio_covers_the_truth():
    def make(rng):
        tokens = rng.integers(5, 40, 60)
        return ratio(tokens * (1 + tokens / 40) + rng.normal(0, 3, 60), tokens, **FAST)

    lengths = np.arange(5, 40)
    assert 0.9 <= covered(make, (lengths * (1 + lengths / 40)).sum() / lengths.sum()) <= 0.994


def test_paired_difference_of_rare_rates_covers_the_truth():
    """Where most draws show no difference at all, a plain bootstrap has intervals of width zero."""

    def make(rng):
        return paired_difference(rng.random(40) < 0.01, np.zeros(40), bounds=(-1, 1), **FAST)

    assert covered(make, 0.01) >= 0.95


def test_mean_of_normal_rows_agrees_with_students_interval():
    rows = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = mean(rows)
    low, high = stats.t.interval(0.95, 399, rows.mean(), stats.sem(rows))
    assert found.value == pytest.approx(rows.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_ratio_weights_rows_by_their_tokens():
    found = ratio([10.0, 2.0], [10.0, 1.0])
    assert found.value == pytest.approx(12 / 11)
    assert found.low <= found.value <= found.high


def test_paired_difference_against_all_sign_flips():
    first, second = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]), np.array([2.0, 1.5, 1.0, 1.0, 4.0, 3.0, 2.5])
    found = paired_difference(first, second)
    flips = [np.mean((first - second) * signs) for signs in itertools.product((1, -1), repeat=7)]
    assert found.value == pytest.approx((first - second).mean())
    assert found.p_value == pytest.approx(np.mean(np.abs(flips) >= abs(found.value) - 1e-12))
    other = paired_difference(second, first)
    assert other.value == pytest.approx(-found.value) and other.p_value == pytest.approx(found.p_value)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    hardness = rng.normal(0, 5, 100)
    found = paired_difference(hardness + 0.5 + rng.normal(0, 0.1, 100), hardness)
    assert found.high - found.low < 0.1 and 0.4 < found.low < found.high < 0.6
    assert found.p_value < 0.001


def test_no_effect_gives_uniform_p_values():
    values = [
        paired_difference(*np.random.default_rng(number).normal(size=(2, 20)), **FAST).p_value for number in range(100)
    ]
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_equal_rows():
    same = paired_difference([0.5] * 30, [0.5] * 30)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    unseen = Z**2 / (30 + Z**2)
    rates = paired_difference([1] * 30, [1] * 30, bounds=(-1, 1))
    assert (rates.low, rates.high) == pytest.approx((-unseen, unseen))
    won = mean([1.0] * 30, bounds=(0, 1))
    assert (won.low, won.high) == pytest.approx((1 - unseen, 1))
    assert math.isnan(mean([1.0]).low)


def test_a_seed_repeats_the_interval():
    rows = np.random.default_rng(0).normal(size=50)
    assert mean(rows, seed=3, **FAST) == mean(rows, seed=3, **FAST) != mean(rows, seed=4, **FAST)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate(0, 0), "at least one row"),
        (lambda: rate(5, 4), "`successes` must be between 0 and n = 4, got 5"),
        (lambda: rate(1, 4, confidence=95), "`confidence` must be between 0 and 1, got 95"),
        (lambda: mean([]), "`values` must be a list of at least one number"),
        (lambda: mean([1.0, float("nan")]), "`values` has 1 values that are not finite"),
        (lambda: ratio([1.0, 2.0], [1.0]), "same rows on both sides, got 2 and 1"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "same rows on both sides, got 2 and 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
