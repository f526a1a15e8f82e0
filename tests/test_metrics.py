"""Intervals: against scipy's own, and their coverage on tasks whose mean is known."""

import numpy as np
import pytest
from scipy import stats

from maml.metrics import interval


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(3, 2, size=7)
    mean, ci95, n = interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - ci95, mean + ci95) == pytest.approx((low, high))
    assert n == 7


def test_of_infinite_values_it_is_no_number():
    mean, ci95, _ = interval([np.inf, 1.0])
    assert mean == np.inf
    assert np.isnan(ci95)


def test_at_600_tasks_it_is_the_papers():
    values = np.random.default_rng(1).uniform(size=600)
    assert interval(values).ci95 == pytest.approx(1.96 * values.std() / np.sqrt(600), rel=5e-3)


@pytest.mark.parametrize("n", [3, 600])
def test_it_covers_the_true_mean_95_times_in_100(n):
    """Task accuracies are 5 Bernoulli queries whose rate differs by task (n = 600), or normal (n = 3 seeds)."""
    generator = np.random.default_rng(2)
    trials = 4000
    if n == 600:
        rates = generator.beta(8, 2, size=(trials, n))
        values, truth = generator.binomial(5, rates) / 5, 0.8
    else:
        values, truth = generator.normal(0.8, 0.1, size=(trials, n)), 0.8
    hits = sum(abs(mean - truth) <= ci95 for mean, ci95, _ in map(interval, values))
    assert abs(hits / trials - 0.95) < 4 * np.sqrt(0.95 * 0.05 / trials)


def test_one_value_has_no_interval_and_none_is_refused():
    assert interval([2.0]) == (2.0, None, 1)
    with pytest.raises(ValueError, match="non-empty vector"):
        interval([])
    with pytest.raises(ValueError, match="non-empty vector"):
        interval([[1.0]])
