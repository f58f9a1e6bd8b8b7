"""Estimates with intervals that cover: rates, means and paired differences over prompts.

    rate([True, False, True], groups=["p1", "p1", "p2"])     # Estimate(value=0.67, low=..., high=..., ...)

Drawings of one prompt are alike, so what is resampled is prompts (`groups`), never drawings. Percentile bootstrap
intervals are too short for few prompts; the percentiles are moved outwards by the factor that Student's t is wider than
the normal (Hesterberg, "What teachers should know about the bootstrap", 2015, section 3.3). A rate near 0 or 1 leaves
the bootstrap nothing to resample: Wilson's score interval, at the effective number of independent drawings, stands in.

No distance between distributions belongs here: a bootstrap of FID repeats pictures, and repeated pictures raise FID.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
FEW = 15  # successes or failures (in independent drawings) below which a rate is not bootstrapped
Numbers = Sequence[float] | np.ndarray
_CHUNK = 4_000_000  # resampling weights held at once


@dataclass(frozen=True)
class Estimate:
    """A number with the interval that holds the true one at the stated level, and how both came about.

    low, high: None where no honest interval exists; `note` then says why. samples: what was averaged.
    """

    value: float
    low: float | None
    high: float | None
    samples: int
    method: str
    level: float = LEVEL
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {key: None if value != value else value for key, value in asdict(self).items()}


def mean(values: Numbers, groups: Sequence[Hashable] | None = None, *, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The mean of `values`, one a drawing, resampled by group (prompt). Raises ValueError where there is no value."""
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        raise ValueError("statistics: no value to average")
    sums_G, sizes_G = _by_group(numbers, groups)
    value = float(numbers.mean())
    if len(sums_G) < 2:
        return Estimate(value, None, None, len(numbers), "none", level, "one prompt tells nothing of others")
    low, high = _bootstrap(sums_G, sizes_G, level, seed)
    return Estimate(value, low, high, len(numbers), f"bootstrap over {len(sums_G)} prompts", level)


def rate(
    successes: Sequence[bool] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """The share of successes. Bootstrap over prompts, or Wilson's interval where too few succeed or fail for one."""
    flags = np.asarray(successes, np.float64)
    if not len(flags):
        raise ValueError("statistics: no drawing to take a rate of")
    sums_G, sizes_G = _by_group(flags, groups)
    share = float(flags.mean())
    independent = _independent(sums_G, sizes_G)
    if min(share, 1 - share) * independent >= FEW:
        low, high = _bootstrap(sums_G, sizes_G, level, seed)
        return Estimate(share, low, high, len(flags), f"bootstrap over {len(sums_G)} prompts", level)
    low, high = wilson(share, independent, level)
    return Estimate(share, low, high, len(flags), f"Wilson score, {independent:.0f} independent drawings", level)


def paired_difference(
    first: Numbers,
    second: Numbers,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Mean of first − second over the same prompts and seeds: what both share (an easy prompt) cancels.

    Of two rates that rarely differ, a bootstrap knows nothing (it would call two models equal that both failed three
    times): Newcombe's interval for paired rates (1998, method 10) stands in.
    """
    if len(first) != len(second):
        raise ValueError(f"statistics: {len(first)} and {len(second)} drawings cannot be paired")
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    differing = int((one != other).sum())
    if len(one) and set(np.unique([one, other])) <= {0.0, 1.0} and differing < 2 * FEW:
        count = min(_independent(*_by_group(flags, groups)) for flags in (one, other))
        low, high = _newcombe(one, other, count, level)
        method = f"Newcombe's paired rates, {count:.0f} independent drawings"
        return Estimate(float(one.mean() - other.mean()), low, high, len(one), method, level)
    return mean(np.asarray(first, np.float64) - np.asarray(second, np.float64), groups, level=level, seed=seed)


def wilson(share: float, count: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval (1927) for a share of `count` independent trials."""
    z = float(stats.norm.ppf(0.5 + level / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    # The interval holds the share; at 0 and 1 rounding must not push it off.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def _newcombe(one: np.ndarray, other: np.ndarray, count: float, level: float) -> tuple[float, float]:
    """From the two Wilson intervals and the correlation of the flags, taken as 0 where either never varies."""
    p, q = float(one.mean()), float(other.mean())
    (p_low, p_high), (q_low, q_high) = wilson(p, count, level), wilson(q, count, level)
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    alike = (float((one * other).mean()) - p * q) / spread if spread > 0 else 0.0
    below = (p - p_low) ** 2 - 2 * alike * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * alike * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    return p - q - math.sqrt(max(below, 0)), p - q + math.sqrt(max(above, 0))


def _by_group(values: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of every group."""
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise ValueError(f"statistics: {len(values)} values but {len(groups)} groups")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    index = np.fromiter((places[group] for group in groups), np.int64, len(values))
    return np.bincount(index, values, len(places)), np.bincount(index, minlength=len(places)).astype(np.float64)


def _independent(sums_G: np.ndarray, sizes_G: np.ndarray) -> float:
    """How many independent drawings say as much as these: their variance by prompt against the binomial's."""
    total, count = sizes_G.sum(), len(sizes_G)
    share = sums_G.sum() / total
    binomial = share * (1 - share)
    if count == total or count < 2:
        return float(total) if count == total else 1.0
    by_prompt = count / (count - 1) * float(((sums_G - share * sizes_G) ** 2).sum()) / total**2
    # Where nothing varies, drawings of one prompt may be one and the same: a prompt counts once.
    return float(np.clip(binomial / by_prompt, 1, total)) if by_prompt > 0 and binomial > 0 else float(count)


def _bootstrap(sums_G: np.ndarray, sizes_G: np.ndarray, level: float, seed: int) -> tuple[float, float]:
    """Expanded percentiles of the ratio of sums over groups drawn with replacement."""
    count = len(sums_G)
    rng = np.random.default_rng([seed, count])
    means = []
    chunk = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, chunk):
        weights_RG = rng.multinomial(count, np.full(count, 1 / count), size=min(chunk, RESAMPLES - start))
        means.append((weights_RG @ sums_G) / (weights_RG @ sizes_G))
    tail = float(stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - level) / 2, count - 1)))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
