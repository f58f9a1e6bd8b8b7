"""Elo, kappa and alpha against worked examples of the literature, and planted judges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from training.evaluation.judgements import (
    Pair,
    audit_judges,
    bradley_terry,
    cohen_kappa,
    krippendorff,
    pairs_by_score,
    strengths,
    win_rate,
    without_faulty,
)

# Agresti, Categorical Data Analysis: the American League's eastern division in 1987, wins of rows over columns.
TEAMS = ["Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore"]
WINS = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]
ABILITIES = [1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0]


def test_bradley_terry_is_agrestis_example() -> None:
    found = strengths(np.array(WINS), prior_draws=0)
    assert (found - found[-1]).tolist() == pytest.approx(ABILITIES, abs=0.006)


def test_two_models_have_the_elo_of_their_odds() -> None:
    """30 wins to 10 are odds of 3: 400·log10(3) points apart."""
    found = strengths(np.array([[0, 30], [10, 0]]), prior_draws=0)
    assert (found[0] - found[1]) * 400 / math.log(10) == pytest.approx(400 * math.log10(3))
    assert win_rate(1400, 1000) == pytest.approx(10 / 11)  # Elo's table: 400 points are ten to one


def test_a_model_that_never_lost_is_refused_or_held_back() -> None:
    table = np.array([[0, 8], [0, 0]])
    with pytest.raises(ValueError, match="never lost"):
        strengths(table, prior_draws=0)
    assert 0 < strengths(table)[0] < 3


def test_elo_intervals_cover_the_planted_strengths() -> None:
    rng = np.random.default_rng(0)
    true = {"a": 120.0, "b": 0.0, "c": -120.0}
    inside = total = 0
    for trial in range(60):
        standings = bradley_terry(_played(rng, true, prompts=80), seed=trial, resamples=200)
        assert np.mean([one.elo for one in standings]) == pytest.approx(1000)
        for one in standings:
            inside += one.low <= 1000 + true[one.model] <= one.high
            total += 1
    assert 0.89 <= inside / total <= 0.99


def _played(rng: np.random.Generator, true: dict[str, float], prompts: int) -> list[Pair]:
    names, found = list(true), []
    for prompt in range(prompts):
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                wins = rng.random() < win_rate(true[one], true[other])
                found.append(Pair(one, other, prompt, one if wins else other, "judge"))
    return found


def test_kappa_is_cohens_example() -> None:
    """Cohen (1960), table 2: 200 patients, three diagnoses; 0.70 agreed, 0.41 by chance, kappa 0.49."""
    table = [[88, 10, 2], [14, 40, 6], [18, 10, 12]]
    first = [i for i, row in enumerate(table) for count in row for _ in range(count)]
    second = [j for row in table for j, count in enumerate(row) for _ in range(count)]
    assert cohen_kappa(first, second) == pytest.approx((0.70 - 0.41) / 0.59)
    assert math.isnan(cohen_kappa(["a", "a"], ["a", "a"]))


# Krippendorff (2011), "Computing Krippendorff's alpha-reliability", example C: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


@pytest.mark.parametrize(("scale", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_krippendorffs_example(scale: str, alpha: float) -> None:
    assert krippendorff(OBSERVERS, scale) == pytest.approx(alpha, abs=5e-4)  # type: ignore[arg-type]


def test_alpha_is_one_for_agreement_and_about_nought_for_noise() -> None:
    rng = np.random.default_rng(1)
    same = [list(range(5)) * 4] * 3
    assert krippendorff(same, "ordinal") == pytest.approx(1)
    assert krippendorff(rng.integers(0, 5, (3, 400)).tolist(), "nominal") == pytest.approx(0, abs=0.06)
    assert math.isnan(krippendorff([[1, 1], [1, 1]]))


# --- planted judges ---------------------------------------------------------------------------------------------------


def _judged(answer: Callable[[np.random.Generator, Pair], str | None], judge: str, seed: int) -> list[Pair]:
    """120 pairs of which every fifth is planted; a looks better than b in four prompts of five."""
    looks, sides = np.random.default_rng(7), np.random.default_rng(100 + seed)
    found = []
    for prompt in range(120):
        better = "a" if looks.random() < 0.8 else "b"
        left, right = ("a", "b") if sides.random() < 0.5 else ("b", "a")
        asked = Pair(left, right, prompt, better, judge, known=better if prompt % 5 == 0 else None)
        winner = answer(sides, asked)
        found.append(Pair(left, right, prompt, winner, judge, asked.known))
    return found


def _honest(rng: np.random.Generator, pair: Pair) -> str | None:
    mistaken = rng.random() < 0.1
    return pair.winner if not mistaken else ("a" if pair.winner == "b" else "b")


def _random(rng: np.random.Generator, pair: Pair) -> str | None:
    return "a" if rng.random() < 0.5 else "b"


def _leftish(rng: np.random.Generator, pair: Pair) -> str | None:
    return pair.left if rng.random() < 0.85 else pair.winner


def test_planted_judges_are_found_and_honest_ones_are_not() -> None:
    accused = by_planted = 0
    for seed in range(10):
        pairs = [
            *_judged(_honest, "ann", 3 * seed),
            *_judged(_honest, "bob", 3 * seed + 1),
            *_judged(_honest, "cid", 3 * seed + 2),
            *_judged(_random, "random", 1000 + seed),
            *_judged(_leftish, "leftish", 2000 + seed),
        ]
        audits = {audit.judge: audit for audit in audit_judges(pairs)}
        assert audits["random"].faults
        by_planted += any("planted" in fault for fault in audits["random"].faults)
        assert any("favours the left" in fault for fault in audits["leftish"].faults)
        accused += sum(bool(audits[name].faults) for name in ("ann", "bob", "cid"))
        left = without_faulty(pairs, list(audits.values()))
        assert {pair.judge for pair in left} <= {"ann", "bob", "cid"}
        assert all(pair.known is None for pair in left)
        assert audits["random"].agreement < 0.3 < audits["ann"].agreement
    assert accused == 0
    assert by_planted >= 6  # 24 planted answers alone find most; agreement with the others finds the rest


def test_a_random_judge_is_found_without_planted_answers_too() -> None:
    pairs = [pair for seed, name in enumerate(("ann", "bob", "cid")) for pair in _judged(_honest, name, seed)]
    pairs += _judged(_random, "random", 50)
    bare = [Pair(pair.left, pair.right, pair.group, pair.winner, pair.judge) for pair in pairs]
    faults = {audit.judge: audit.faults for audit in audit_judges(bare)}
    assert any("no more than chance" in fault for fault in faults.pop("random"))
    assert set(faults.values()) == {()}


def test_honest_judges_are_kept_where_one_model_nearly_always_wins() -> None:
    """Kappa is near 0 there for everyone; who looks still agrees far more often than a coin does."""
    rng = np.random.default_rng(4)
    pairs = []
    for judge in ("ann", "bob", "cid"):
        for prompt in range(60):
            left, right = ("a", "b") if rng.random() < 0.5 else ("b", "a")
            pairs.append(Pair(left, right, prompt, "a" if rng.random() < 0.85 else "b", judge))
    audits = audit_judges(pairs)
    assert [audit.faults for audit in audits] == [(), (), ()]
    assert all(abs(audit.agreement) < 0.4 for audit in audits)


def test_scores_make_pairs_of_the_same_drawings() -> None:
    scores = {"a": {("p", 0): 0.3, ("q", 1): 0.5, ("r", 2): 0.1}, "b": {("p", 0): 0.2, ("q", 1): 0.5}}
    pairs = pairs_by_score(scores, "clip", groups=lambda key: key[0])
    assert [(pair.group, pair.winner) for pair in pairs] == [("p", "a"), ("q", None)]
    assert {pair.left for pair in pairs} == {"a", "b"}
