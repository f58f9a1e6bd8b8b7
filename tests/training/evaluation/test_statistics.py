"""Intervals cover at the rate they state, in simulation; exactly where that can be summed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from training.evaluation.statistics import mean, paired_difference, rate, wilson


@pytest.mark.parametrize("trials", [40, 120])
@pytest.mark.parametrize("true", [0.02, 0.1, 0.5, 0.8, 0.98])
def test_rates_cover(trials: int, true: float) -> None:
    """Summed over every number of successes, so without noise of its own. Discrete: it cannot be 95 % everywhere."""
    found = [rate([True] * k + [False] * (trials - k)) for k in range(trials + 1)]
    chance = stats.binom.pmf(np.arange(trials + 1), trials, true)
    covered = sum(p for p, one in zip(chance, found, strict=True) if one.low <= true <= one.high)
    assert 0.92 <= covered <= 0.995


def test_means_cover_also_of_skewed_values() -> None:
    rng = np.random.default_rng(0)
    for sample, true in ((rng.normal, 0.0), (rng.exponential, 1.0)):
        found = [mean(sample(size=50), seed=trial) for trial in range(200)]
        covered = np.mean([one.low <= true <= one.high for one in found])
        assert 0.9 <= covered <= 0.99


def test_drawings_of_one_prompt_do_not_count_as_independent() -> None:
    """A prompt is easy or hard: intervals over prompts cover where intervals over drawings fall far short."""
    rng = np.random.default_rng(1)
    over_prompts = over_drawings = 0
    for trial in range(150):
        ease = rng.beta(0.4, 0.4, 40)
        right = rng.random((40, 6)) < ease[:, None]
        prompts = np.repeat(np.arange(40), 6).tolist()
        one, naive = rate(right.ravel().tolist(), prompts, seed=trial), rate(right.ravel().tolist(), seed=trial)
        over_prompts += one.low <= 0.5 <= one.high
        over_drawings += naive.low <= 0.5 <= naive.high
    assert 0.91 <= over_prompts / 150 <= 0.99
    assert over_drawings / 150 < 0.8


def test_no_success_at_all_still_leaves_room() -> None:
    nothing = rate([False] * 30)
    assert nothing.value == 0
    assert nothing.low == 0
    assert nothing.high == pytest.approx(wilson(0, 30)[1])
    assert nothing.high == pytest.approx(0.1135, abs=1e-4)  # z²/(n + z²)
    same = rate([False] * 30, groups=[number // 10 for number in range(30)])
    assert same.high > nothing.high  # three prompts say less than thirty


def test_pairs_cancel_what_both_share() -> None:
    rng = np.random.default_rng(2)
    ease = rng.normal(0, 10, 60)
    first, second = ease + rng.normal(1, 0.5, 60), ease + rng.normal(0, 0.5, 60)
    paired = paired_difference(first, second)
    assert 0 < paired.low < 1 < paired.high < 1.5
    assert mean(first).low < mean(second).high  # apart they tell nothing
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(first, second[1:])


def test_two_models_that_both_failed_are_not_called_equal() -> None:
    never = paired_difference([False] * 3, [False] * 3)
    assert never.low == pytest.approx(-wilson(0, 3)[1])
    assert never.high == pytest.approx(wilson(0, 3)[1])


@pytest.mark.parametrize(
    ("both", "first_only", "second_only"), [(0.7, 0.1, 0.02), (0.05, 0.05, 0.05), (0.9, 0.02, 0.02)]
)
def test_differences_of_paired_rates_cover(both: float, first_only: float, second_only: float) -> None:
    rng, inside = np.random.default_rng(3), 0
    chances = [both, first_only, second_only, 1 - both - first_only - second_only]
    for trial in range(150):
        kind = rng.choice(4, size=60, p=chances)
        found = paired_difference(np.isin(kind, [0, 1]), np.isin(kind, [0, 2]), seed=trial)
        inside += found.low <= first_only - second_only <= found.high
    assert inside >= 0.91 * 150


def test_one_prompt_has_no_interval() -> None:
    alone = mean([1.0, 2.0, 3.0], groups=["a", "a", "a"])
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    assert "one prompt" in alone.note
