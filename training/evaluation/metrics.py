"""What features alone say of sets of pictures: FID, KID, precision, recall, Inception Score, CLIP score, diversity.

    fid(drawn_ND, real_MD)                                  # the plain figure: biased upwards, by about c/N
    fid_estimate(drawn_ND, real_MD, small_sample=True)      # extrapolated to N = ∞, with an interval that covers

Axes: N drawn pictures, M real ones, D features, C classes. Everything is computed in float64, and agrees with
torchmetrics on the same features.

FID of a finite sample is too high by about c/N: two samples of 5,000 from one Gaussian in 256 dimensions are 6.6 apart
(3.5 where only one of the two is so small). Below `ENOUGH` pictures it is therefore refused unless a small sample is
asked for; it is then computed on parts of the sample, and a line through FID against 1/N gives it at 1/N = 0 (after
Chong and Forsyth, 2020, "Effectively Unbiased FID and Inception Score"). Its interval comes from leaving out tenths of
the pictures (a jackknife). A bootstrap would repeat pictures, which raises FID itself: its interval lies above the
plain figure and far from the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg, stats

from training.evaluation.statistics import LEVEL, Estimate

ENOUGH = 10_000  # pictures on either side, as the literature asks for
PARTS = (1, 2, 4)  # the sample is cut into so many disjoint parts for the line through FID against 1/N
BLOCKS = 10  # left out one at a time by the jackknife
WIDE_BLOCKS = 5  # the same for features so wide that one FID takes seconds
WIDE = 512
CURVED = 0.25  # departure from the line, as a share of the bias taken out, beyond which it is said
NEIGHBOURS = 3  # k of precision and recall, as their paper has it
ROWS = 2048  # rows of a distance or kernel matrix held at once


class TooFewError(ValueError):
    """Too few pictures for the figure that was asked for; the message says what to do."""


# --- FID --------------------------------------------------------------------------------------------------------------


def fid(drawn_ND: np.ndarray, real_MD: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features (Heusel et al., 2017)."""
    a_ND, b_MD = _features(drawn_ND), _features(real_MD)
    return frechet(a_ND.mean(0), _covariance(a_ND), b_MD.mean(0), _covariance(b_MD))


def frechet(mean_D: np.ndarray, cov_DD: np.ndarray, other_mean_D: np.ndarray, other_cov_DD: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½."""
    values, vectors_DK = linalg.eigh(cov_DD)
    half_DK = vectors_DK * np.sqrt(np.clip(values, 0, None))
    between = linalg.eigvalsh(half_DK.T @ other_cov_DD @ half_DK)
    gap = float(((mean_D - other_mean_D) ** 2).sum())
    return gap + float(np.trace(cov_DD) + np.trace(other_cov_DD)) - 2 * float(np.sqrt(np.clip(between, 0, None)).sum())


@dataclass(frozen=True)
class FidEstimate:
    """estimate: FID with its interval. raw: the plain figure at these sizes. parts: (pictures, FID) behind the line."""

    estimate: Estimate
    raw: float
    extrapolated: bool
    parts: tuple[tuple[int, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        parts = [list(part) for part in self.parts]
        return {**self.estimate.to_json(), "raw": self.raw, "extrapolated": self.extrapolated, "parts": parts}


def fid_estimate(
    drawn_ND: np.ndarray, real_MD: np.ndarray, *, small_sample: bool = False, level: float = LEVEL, seed: int = 0
) -> FidEstimate:
    """FID as it may be reported.

    From ENOUGH pictures on either side up: the plain figure without an interval, as the literature has it. Below: only
    with `small_sample`, extrapolated in 1/N with a jackknife interval; both sets are thinned alike, so that the bias of
    either goes. Raises TooFewError otherwise, and where even that cannot be had (fewer than 2·PARTS·BLOCKS pictures).
    """
    a_ND, b_MD = _features(drawn_ND), _features(real_MD)
    fewest = min(len(a_ND), len(b_MD))
    if fewest >= ENOUGH and not small_sample:
        note = "no interval: a bootstrap of FID does not cover"
        value = fid(a_ND, b_MD)
        return FidEstimate(Estimate(value, None, None, len(a_ND), "plain FID", level, note), value, False)
    if not small_sample:
        raise TooFewError(
            f"FID of {len(a_ND):,} drawn against {len(b_MD):,} real pictures is dominated by its bias: draw at least "
            f"{ENOUGH:,}, or pass --small-sample for a figure extrapolated in 1/N"
        )
    blocks = BLOCKS if a_ND.shape[1] <= WIDE else WIDE_BLOCKS
    least = 2 * max(PARTS) * blocks
    if fewest < least:
        raise TooFewError(f"FID from {fewest} pictures cannot be extrapolated: at least {least} are needed")
    rng = np.random.default_rng([seed, 11])
    a_ND, b_MD = a_ND[rng.permutation(len(a_ND))], b_MD[rng.permutation(len(b_MD))]
    value, parts, curvature = _extrapolate(a_ND, b_MD)
    left_out = [(np.arange(len(a_ND)) % blocks == k, np.arange(len(b_MD)) % blocks == k) for k in range(blocks)]
    without = [_extrapolate(a_ND[~mine], b_MD[~theirs])[0] for mine, theirs in left_out]
    error = math.sqrt((blocks - 1) / blocks * float(((np.array(without) - np.mean(without)) ** 2).sum()))
    reach = float(stats.t.ppf(0.5 + level / 2, blocks - 1)) * error
    note = f"small sample: plain FID would say {parts[0][1]:.4g}, of which {parts[0][1] - value:.4g} is bias"
    smallest = min(size for size, _ in parts)
    if smallest <= a_ND.shape[1]:
        note += f"; parts of {smallest} pictures in {a_ND.shape[1]} dimensions: the line is not to be trusted"
    elif curvature > CURVED:
        note += "; FID against 1/N is not a line: the figure is rough"
    method = f"extrapolated in 1/N, jackknife over {blocks} blocks"
    # FID is never negative; the extrapolation may be, by its error.
    low, middle, high = (max(figure, 0.0) for figure in (value - reach, value, value + reach))
    estimate = Estimate(middle, low, high, len(a_ND), method, level, note)
    return FidEstimate(estimate, parts[0][1], True, tuple(parts))


def _extrapolate(a_ND: np.ndarray, b_MD: np.ndarray) -> tuple[float, list[tuple[int, float]], float]:
    """(FID at 1/N = 0, FID by size, how far the points lie off their line)."""
    points = []
    for count in PARTS:
        values = [fid(a_ND[k::count], b_MD[k::count]) for k in range(count)]
        points.append((len(a_ND) // count, float(np.mean(values))))
    x, y = np.array(PARTS, np.float64), np.array([value for _, value in points])
    # Larger parts weigh more: terms beyond 1/N bend the line where parts are small.
    slope, intercept = np.polyfit(x, y, 1, w=1 / x)
    bent = float(np.abs(slope * x + intercept - y).max())
    return float(intercept), points, bent / max(abs(float(slope)), 1e-12)


def _covariance(x_ND: np.ndarray) -> np.ndarray:
    centred = x_ND - x_ND.mean(0)
    return centred.T @ centred / (len(x_ND) - 1)


def _features(given: np.ndarray) -> np.ndarray:
    found = np.asarray(given, np.float64)
    if found.ndim != 2 or len(found) < 2:
        raise TooFewError(f"features of shape {found.shape}: expected (pictures, dimensions) with 2 pictures or more")
    if not np.isfinite(found).all():
        raise ValueError("features hold numbers that are not finite: a picture or the network is broken")
    return found


# --- KID --------------------------------------------------------------------------------------------------------------


def kid(drawn_ND: np.ndarray, real_MD: np.ndarray, *, level: float = LEVEL) -> Estimate:
    """Unbiased squared MMD under the kernel (x·y/D + 1)³ over all pictures (Bińkowski et al., 2018).

    Its interval is a delete-one jackknife, which for such sums needs nothing but row sums. Near 0 it is too wide
    rather than too short.
    """
    a_ND, b_MD = _features(drawn_ND), _features(real_MD)
    n, m = len(a_ND), len(b_MD)
    aa_N, bb_M = _kernel_sums(a_ND, a_ND, True), _kernel_sums(b_MD, b_MD, True)
    ab_N, ab_M = _kernel_sums(a_ND, b_MD, False), _kernel_sums(b_MD, a_ND, False)
    aa, bb, ab = aa_N.sum(), bb_M.sum(), ab_N.sum()
    value = aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)
    if min(n, m) < 4:
        return Estimate(float(value), None, None, n, "unbiased MMD", level, "too few pictures for an interval")
    without_N = (aa - 2 * aa_N) / ((n - 1) * (n - 2)) + bb / (m * (m - 1)) - 2 * (ab - ab_N) / ((n - 1) * m)
    without_M = aa / (n * (n - 1)) + (bb - 2 * bb_M) / ((m - 1) * (m - 2)) - 2 * (ab - ab_M) / (n * (m - 1))
    variance = (n - 1) * without_N.var() + (m - 1) * without_M.var()
    reach = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt(variance)
    return Estimate(float(value), float(value) - reach, float(value) + reach, n, "unbiased MMD, jackknife", level)


def _kernel_sums(a_ND: np.ndarray, b_MD: np.ndarray, same: bool) -> np.ndarray:
    """(N,) sums over b of the kernel, a picture with itself left out where both sets are one."""
    sums = np.empty(len(a_ND))
    for start in range(0, len(a_ND), ROWS):
        part = a_ND[start : start + ROWS]
        sums[start : start + ROWS] = ((part @ b_MD.T / part.shape[1] + 1) ** 3).sum(1)
    return sums - ((a_ND * a_ND).sum(1) / a_ND.shape[1] + 1) ** 3 if same else sums


# --- precision and recall ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifolds:
    """Which pictures of one set lie in the other's manifold: precise (N,) drawn ones, recalled (M,) real ones."""

    precise: np.ndarray
    recalled: np.ndarray


def precision_recall(drawn_ND: np.ndarray, real_MD: np.ndarray, neighbours: int = NEIGHBOURS) -> Manifolds:
    """Improved precision and recall (Kynkäänniemi et al., 2019): the manifold of a set is the union of the balls
    around its members that reach to their k-th nearest neighbour in the set.

    Precision is the share of drawn pictures in the real manifold, recall the reverse. The two grow with the sizes of
    the sets: compare models only at the same numbers.
    """
    a_ND, b_MD = _features(drawn_ND), _features(real_MD)
    if min(len(a_ND), len(b_MD)) <= neighbours:
        raise TooFewError(f"precision and recall need more than {neighbours} pictures on either side")
    return Manifolds(_inside(a_ND, b_MD, neighbours), _inside(b_MD, a_ND, neighbours))


def _inside(points_ND: np.ndarray, members_MD: np.ndarray, neighbours: int) -> np.ndarray:
    """(N,) whether each point lies in the manifold of the members."""
    reach_M = np.concatenate(
        [np.partition(part, neighbours, axis=1)[:, neighbours] for part in _squared_distances(members_MD, members_MD)]
    )
    return np.concatenate([(part <= reach_M).any(1) for part in _squared_distances(points_ND, members_MD)])


def _squared_distances(a_ND: np.ndarray, b_MD: np.ndarray) -> Any:
    """Blocks of rows of the (N, M) matrix of squared distances. A member's distance to itself is exactly 0."""
    b_norms_M = (b_MD * b_MD).sum(1)
    for start in range(0, len(a_ND), ROWS):
        part = a_ND[start : start + ROWS]
        block = np.maximum((part * part).sum(1)[:, None] + b_norms_M - 2 * part @ b_MD.T, 0)
        if a_ND is b_MD:
            block[np.arange(len(part)), start + np.arange(len(part))] = 0
        yield block


# --- Inception Score, CLIP score --------------------------------------------------------------------------------------


def inception_score(logits_NC: np.ndarray, splits: int = 10) -> Estimate:
    """exp of the mean KL divergence between each picture's classes and all pictures' (Salimans et al., 2016).

    The mean over `splits` parts, as published figures have it. One perfect picture a class scores highest: it says
    nothing of diversity within classes and is no reason to choose a model.
    """
    logits = _features(logits_NC)
    parts = [part for part in np.array_split(logits, min(splits, len(logits))) if len(part)]
    scores = np.array([_score_of(part) for part in parts])
    return Estimate(float(scores.mean()), None, None, len(logits), f"mean of {len(parts)} parts", LEVEL, "biased in N")


def _score_of(logits_NC: np.ndarray) -> float:
    log_p = logits_NC - np.logaddexp.reduce(logits_NC, axis=1, keepdims=True)
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - np.log(p.mean(0)))).sum(1).mean()))


def clip_scores(images_ND: np.ndarray, texts_ND: np.ndarray) -> np.ndarray:
    """(N,) 100 × cosine of each picture with its own prompt. Negative ones stay: their mean is what is reported."""
    images, texts = _unit(images_ND), _unit(texts_ND)
    if images.shape != texts.shape:
        raise ValueError(f"CLIP score: pictures {images.shape} and prompts {texts.shape} do not pair")
    return 100 * (images * texts).sum(1)


# --- diversity --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diversity:
    """effective: pictures that differ, of `of` pictures (Vendi score). apart: mean cosine distance of two pictures."""

    effective: float
    apart: float
    of: int


def diversity(features_ND: np.ndarray) -> Diversity:
    """The Vendi score (Friedman and Dieng, 2023): exp of the entropy of the eigenvalues of the cosine matrix over N.

    N alike pictures count as 1, N mutually orthogonal ones as N. Features are centred first: a network's features share
    a large common part that makes every two pictures look alike. Compare only at the same N, and with the real ones.
    """
    raw = _features(features_ND)
    centred = raw - raw.mean(0)
    # One picture repeated leaves rounding alone, which has no direction.
    if np.abs(centred).max() <= 1e-9 * max(np.abs(raw).max(), 1e-30):
        return Diversity(1.0, 0.0, len(raw))
    unit = _unit(centred)
    gram = unit.T @ unit if unit.shape[0] > unit.shape[1] else unit @ unit.T
    shares = np.clip(linalg.eigvalsh(gram) / len(unit), 1e-300, None)
    n = len(unit)
    apart = 1 - (float((unit.sum(0) ** 2).sum()) - n) / (n * (n - 1))
    return Diversity(float(np.exp(-(shares * np.log(shares)).sum())), apart, n)


def within_prompts(features_ND: np.ndarray, prompts: Sequence[Any]) -> tuple[np.ndarray, list[Any]]:
    """Mean cosine distance between the drawings of each prompt that was drawn more than once, and those prompts."""
    unit = _unit(np.asarray(features_ND, np.float64))
    places: dict[Any, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    found, of = [], []
    for prompt, mine in places.items():
        if len(mine) > 1:
            n = len(mine)
            found.append(1 - (float((unit[mine].sum(0) ** 2).sum()) - n) / (n * (n - 1)))
            of.append(prompt)
    return np.array(found), of


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x = np.asarray(x_ND, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
