"""Bounds on false pairs against the probabilities that they are made of."""

import numpy as np
import pytest
from scipy.stats import poisson

from stages.false_pairs import FalsePairs


def test_none_found_is_the_rule_of_three():
    assert FalsePairs(0, 10**6).rate_at_most() == pytest.approx(3e-6, rel=0.002)


@pytest.mark.parametrize("found", [0, 1, 4, 30])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_at_the_bound_so_few_would_be_seen_with_the_rest_of_the_confidence(found, confidence):
    rate = FalsePairs(found, 10_000).rate_at_most(confidence)
    assert poisson.cdf(found, rate * 10_000) == pytest.approx(1 - confidence)


def test_the_bound_covers_the_true_rate_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = rng.poisson(5.0, 4000)
    covered = np.mean([FalsePairs(int(count), 1000).rate_at_most(0.95) >= 5e-3 for count in found])
    assert 0.94 <= covered <= 0.99


def test_false_pairs_grow_with_the_square_and_precision_falls():
    bound = FalsePairs(4, 7_700_000)
    assert bound.expected_at_most(10**6) == pytest.approx(100 * bound.expected_at_most(10**5), rel=1e-4)
    shares = [bound.precision_at_least(rows, 0.1) for rows in (10**3, 10**5, 10**7)]
    assert shares == sorted(shares, reverse=True)
    rows = bound.rows_with_precision(0.99, 0.1)
    assert bound.precision_at_least(round(rows), 0.1) == pytest.approx(0.99, abs=1e-4)


def test_nothing_looked_at_bounds_nothing():
    assert FalsePairs(0, 0).rate_at_most() == 1.0
    assert FalsePairs(0, 10).precision_at_least(100, 0.0) == 0.0
