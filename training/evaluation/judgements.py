"""Judgements of people and of models: pairs to Elo (Bradley-Terry), agreement, and judges who do not look.

    table = bradley_terry([Pair("student", "teacher", "prompt 3", winner="teacher", judge="ann"), ...])
    krippendorff([["a", "a", None], ["a", "b", "b"]])          # one row a judge, None where he said nothing

Elo here is the maximum of the Bradley-Terry likelihood over all pairs at once, on Elo's scale (400 points are odds of
10 to 1): it does not depend on the order of the games, as updating one game at a time does.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from training.evaluation.statistics import LEVEL, wilson

ELO_AT_MEAN = 1000.0
ELO_PER_LOG_ODDS = 400 / math.log(10)
PRIOR_DRAWS = 0.5  # of a draw between every two models: keeps a model that never lost from going to infinity
RESAMPLES = 300
SUSPECT = 0.001  # chance below which an honest judge is not believed to have answered so


@dataclass(frozen=True)
class Pair:
    """One judgement: `left` stood on the left. winner: a model's name, or None for a draw.

    group: the prompt; pairs of one prompt are resampled together. known: the planted right answer, where there is one.
    """

    left: str
    right: str
    group: Hashable
    winner: str | None
    judge: str = ""
    known: str | None = None


@dataclass(frozen=True)
class Standing:
    """A model's Elo with its interval, and what it won, drew and lost."""

    model: str
    elo: float
    low: float | None
    high: float | None
    won: int
    drawn: int
    lost: int


# --- Bradley-Terry ----------------------------------------------------------------------------------------------------


def strengths(wins_MM: np.ndarray, prior_draws: float = PRIOR_DRAWS) -> np.ndarray:
    """Log strengths (M,), mean 0, of the Bradley-Terry model: P(i beats j) = 1 / (1 + e^(s_j − s_i)).

    wins_MM[i, j]: how often i beat j; a draw counts half for each. prior_draws: draws added between every two models.
    Without any (0), raises ValueError where some models never lost to the rest, which has no finite maximum.
    """
    wins = np.asarray(wins_MM, np.float64) + prior_draws / 2
    np.fill_diagonal(wins, 0)
    count = len(wins)
    if prior_draws == 0 and not _all_connected(wins > 0):
        raise ValueError("Bradley-Terry: some models never lost to the others: their strength has no finite estimate")
    games = wins + wins.T
    s = np.zeros(count)
    for _ in range(100):
        p = 1 / (1 + np.exp(s[None, :] - s[:, None]))
        gradient = (wins - games * p).sum(1)
        weights = games * p * (1 - p)
        hessian = np.diag(weights.sum(1)) - weights + 1.0 / count  # the added constant fixes the mean at 0
        step = np.linalg.solve(hessian, gradient)
        s = s + step / max(1.0, float(np.abs(step).max()))  # a damped Newton step: the likelihood is concave
        s -= s.mean()
        if np.abs(step).max() < 1e-10:
            break
    return s


def _all_connected(beats_MM: np.ndarray) -> bool:
    """Whether from every model a chain of wins leads to every other."""
    reach = beats_MM | np.eye(len(beats_MM), dtype=bool)
    for _ in range(len(beats_MM)):
        reach = reach | ((reach.astype(int) @ reach.astype(int)) > 0)
    return bool(reach.all())


def bradley_terry(
    pairs: Sequence[Pair], *, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> list[Standing]:
    """Elo of every model in `pairs`, the best first, with bootstrap intervals over prompts. The mean is 1000."""
    names = sorted({name for pair in pairs for name in (pair.left, pair.right)})
    place = {name: number for number, name in enumerate(names)}
    by_group: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros((len(names), len(names))))
    for pair in pairs:
        left, right = place[pair.left], place[pair.right]
        share = 0.5 if pair.winner is None else float(pair.winner == pair.left)
        by_group[pair.group][left, right] += share
        by_group[pair.group][right, left] += 1 - share
    tables_GMM = np.stack(list(by_group.values()))
    elo = ELO_AT_MEAN + ELO_PER_LOG_ODDS * strengths(tables_GMM.sum(0))
    low = high = np.full(len(names), np.nan)
    if len(tables_GMM) > 1:
        rng = np.random.default_rng([seed, 13])
        weights = rng.multinomial(len(tables_GMM), np.full(len(tables_GMM), 1 / len(tables_GMM)), size=resamples)
        again = [ELO_AT_MEAN + ELO_PER_LOG_ODDS * strengths(np.tensordot(w, tables_GMM, 1)) for w in weights]
        low, high = np.quantile(again, [(1 - level) / 2, (1 + level) / 2], axis=0)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in pairs:
        for name in (pair.left, pair.right):
            counts[name]["drawn" if pair.winner is None else "won" if pair.winner == name else "lost"] += 1
    found = []
    for name, i in place.items():
        below, above = (None if math.isnan(end) else float(end) for end in (low[i], high[i]))
        won, drawn, lost = (counts[name][outcome] for outcome in ("won", "drawn", "lost"))
        found.append(Standing(name, float(elo[i]), below, above, won, drawn, lost))
    return sorted(found, key=lambda one: -one.elo)


def win_rate(elo: float, other: float) -> float:
    """The share of pairs that a model of `elo` wins against one of `other`."""
    return 1 / (1 + 10 ** ((other - elo) / 400))


# --- agreement --------------------------------------------------------------------------------------------------------

Scale = Literal["nominal", "ordinal", "interval"]


def cohen_kappa(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Cohen's kappa (1960) of two judges over the same things. NaN where chance alone would agree on everything."""
    if len(first) != len(second) or not first:
        raise ValueError(f"kappa: {len(first)} and {len(second)} judgements do not pair")
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    one, other = Counter(first), Counter(second)
    chance = sum(one[value] * other[value] for value in one) / len(first) ** 2
    return (agreed - chance) / (1 - chance) if chance < 1 else math.nan


def krippendorff(ratings: Sequence[Sequence[Any]], scale: Scale = "nominal") -> float:
    """Krippendorff's alpha (2011) of any number of judges: one row a judge, one column a thing, None for no answer.

    scale: how far two different answers are apart ("ordinal" and "interval" need numbers). NaN where nothing varies or
    nothing was judged twice.
    """
    answered = [[row[k] for row in ratings if row[k] is not None] for k in range(len(ratings[0]) if ratings else 0)]
    units = [unit for unit in answered if len(unit) > 1]
    values = sorted({value for unit in units for value in unit})
    place = {value: number for number, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in units:
        counts = np.bincount([place[value] for value in unit], minlength=len(values)).astype(float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidences.sum(1)
    apart = _apart(values, totals, scale)
    expected = float((np.outer(totals, totals) - np.diag(totals)).ravel() @ apart.ravel()) / max(totals.sum() - 1, 1)
    return 1 - float((coincidences * apart).sum()) / expected if expected > 0 else math.nan


def _apart(values: Sequence[Any], totals: np.ndarray, scale: Scale) -> np.ndarray:
    """Squared difference of every two answers on a scale."""
    if scale == "nominal":
        return 1 - np.eye(len(values))
    if scale == "interval":
        numbers = np.asarray(values, np.float64)
        return (numbers[:, None] - numbers[None, :]) ** 2
    if scale == "ordinal":
        # Between ranks lie as many answers as were given, half of either end's.
        middle = np.cumsum(totals) - totals / 2
        return (middle[:, None] - middle[None, :]) ** 2
    raise ValueError(f"alpha: scale {scale!r} is none of nominal, ordinal, interval")


# --- judges who do not look -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeAudit:
    """What one judge's answers look like. faults: reasons not to count them, empty for a judge who seems to look.

    left: share of decided pairs given to the left side, which is random. known: share of planted pairs answered
    rightly. agreement: kappa with the majority of the other judges.
    """

    judge: str
    pairs: int
    left: float | None
    known: tuple[int, int]
    agreement: float | None
    faults: tuple[str, ...] = field(default=())


def audit_judges(pairs: Sequence[Pair], *, suspect: float = SUSPECT, known_at_least: float = 0.8) -> list[JudgeAudit]:
    """Look at every judge: does he favour a side, miss planted answers, or agree with nobody?

    A fault is called only where an honest judge would look so with a chance below `suspect` (for planted answers: one
    who knows at least `known_at_least` of them).
    """
    by_judge: dict[str, list[Pair]] = defaultdict(list)
    votes: dict[Hashable, dict[str, str | None]] = defaultdict(dict)
    for pair in pairs:
        by_judge[pair.judge].append(pair)
        votes[_question(pair)][pair.judge] = pair.winner
    return [_audit(judge, mine, votes, suspect, known_at_least) for judge, mine in sorted(by_judge.items())]


def _question(pair: Pair) -> Hashable:
    return (pair.group, *sorted((pair.left, pair.right)))


def _audit(
    judge: str, mine: Sequence[Pair], votes: Mapping[Hashable, Mapping[str, str | None]], suspect: float, asked: float
) -> JudgeAudit:
    faults = []
    decided = [pair for pair in mine if pair.winner is not None]
    lefts = sum(pair.winner == pair.left for pair in decided)
    if decided:
        chance = float(stats.binomtest(lefts, len(decided), 0.5).pvalue)
        if chance < suspect:
            side = "left" if lefts * 2 > len(decided) else "right"
            faults.append(f"favours the {side}: {lefts} of {len(decided)} decided pairs went left")
    planted = [pair for pair in mine if pair.known is not None]
    right = sum(pair.winner == pair.known for pair in planted)
    if planted and float(stats.binom.cdf(right, len(planted), asked)) < suspect:
        faults.append(f"missed planted answers: {right} of {len(planted)} right")
    own, others = [], []
    for pair in mine:
        rest = Counter(vote for name, vote in votes[_question(pair)].items() if name != judge)
        if rest and (len(rest) == 1 or rest.most_common(2)[0][1] > rest.most_common(2)[1][1]):
            own.append(pair.winner)
            others.append(rest.most_common(1)[0][0])
    agreement = cohen_kappa(own, others) if own else None
    if agreement is not None and len(own) >= 20 and _no_better_than_chance(own, others, suspect):
        faults.append(f"agrees with the others no more than chance (kappa {agreement:.2f} over {len(own)} pairs)")
    left = lefts / len(decided) if decided else None
    return JudgeAudit(judge, len(mine), left, (right, len(planted)), agreement, tuple(faults))


def _no_better_than_chance(own: Sequence[Any], others: Sequence[Any], suspect: float) -> bool:
    """Whether agreement looks like that of someone who does not look, and would surprise in someone who does.

    Sides are random, so who does not look agrees on half of the decided pairs, whichever model is better. (Kappa's
    chance is another one: where all find one model better nearly always, kappa is near 0 for honest judges too.)
    """
    decided = [(a, b) for a, b in zip(own, others, strict=True) if a is not None and b is not None]
    if not decided:
        return False
    low, high = wilson(sum(a == b for a, b in decided) / len(decided), len(decided), 1 - 2 * suspect)
    return low <= 0.5 and high < 0.85


def without_faulty(pairs: Sequence[Pair], audits: Sequence[JudgeAudit]) -> list[Pair]:
    """The pairs of judges without a fault, planted ones left out: those are not about the models."""
    faulty = {audit.judge for audit in audits if audit.faults}
    return [pair for pair in pairs if pair.judge not in faulty and pair.known is None]


# --- a model as judge -------------------------------------------------------------------------------------------------


def pairs_by_score(
    scores: Mapping[str, Mapping[Hashable, float]],
    judge: str,
    tie: float = 0.0,
    groups: Callable[[Any], Hashable] = lambda key: key,
) -> list[Pair]:
    """Pairs from a model's scores of the same drawings: the higher score wins, scores within `tie` draw.

    scores: model -> drawing (prompt and seed) -> score. groups: the prompt of a drawing. Sides alternate, since a
    score has no side.
    """
    names, found = sorted(scores), []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            for number, key in enumerate(sorted(scores[one].keys() & scores[other].keys(), key=str)):
                gap = scores[one][key] - scores[other][key]
                winner = None if abs(gap) <= tie else one if gap > 0 else other
                left, right = (one, other) if number % 2 == 0 else (other, one)
                found.append(Pair(left, right, groups(key), winner, judge))
    return found
