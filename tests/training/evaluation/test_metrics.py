"""Metrics against torchmetrics on the same features, and against what was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.manifolds import in_manifold
from training.evaluation import metrics

RNG = np.random.default_rng(0)


class Given(torch.nn.Module):
    """Stands where torchmetrics expects a network: a picture's features are its pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.reshape(len(pictures), -1)[:, : self.width]


def drawn_and_real(width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    mixing = RNG.normal(size=(width, width))
    return RNG.normal(size=(300, width)) @ mixing + 0.3, RNG.normal(size=(400, width)) @ (mixing + 0.4)


def test_fid_is_torchmetrics_fid() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    drawn, real = drawn_and_real()
    theirs = FrechetInceptionDistance(feature=Given(16), input_img_size=(1, 1, 16)).set_dtype(torch.float64)
    theirs.update(torch.tensor(real).reshape(400, 1, 1, 16), real=True)
    theirs.update(torch.tensor(drawn).reshape(300, 1, 1, 16), real=False)
    assert metrics.fid(drawn, real) == pytest.approx(float(theirs.compute()), rel=1e-6, abs=1e-4)


def test_fid_of_known_gaussians_is_the_formula() -> None:
    """Diagonal covariances: |μ₁ − μ₂|² + Σ(s₁ − s₂)²."""
    s, t, gap = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5]), np.array([0.0, 1.0, -2.0])
    found = metrics.frechet(np.zeros(3), np.diag(s**2), gap, np.diag(t**2))
    assert found == pytest.approx(5 + 0.25 + 1)


def test_kid_is_torchmetrics_kid() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    drawn, real = drawn_and_real()
    real = real[:300]  # torchmetrics takes as many of either side
    theirs = KernelInceptionDistance(feature=Given(16), subsets=1, subset_size=300).set_dtype(torch.float64)
    theirs.update(torch.tensor(real).reshape(300, 1, 1, 16), real=True)
    theirs.update(torch.tensor(drawn).reshape(300, 1, 1, 16), real=False)
    assert metrics.kid(drawn, real).value == pytest.approx(float(theirs.compute()[0]), rel=1e-6, abs=1e-4)


def test_kid_covers() -> None:
    rng = np.random.default_rng(3)
    shift = np.array([0.7, 0, 0, 0])
    # For x, y ~ N(0, I) and N(s, I) the kernel's mean over pairs, by its moments, from a very large sample.
    true = metrics.kid(rng.normal(size=(5000, 4)), rng.normal(size=(5000, 4)) + shift).value
    found = [metrics.kid(rng.normal(size=(120, 4)), rng.normal(size=(150, 4)) + shift) for _ in range(150)]
    assert 0.88 <= np.mean([one.low <= true <= one.high for one in found]) <= 0.995


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_is_torchmetrics_score(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = RNG.normal(size=(200, 12)) * 3
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))  # theirs shuffles; ours keeps the order
    theirs = InceptionScore(feature=Given(12), splits=splits).set_dtype(torch.float64)
    theirs.update(torch.tensor(logits).reshape(200, 1, 1, 12))
    assert metrics.inception_score(logits, splits).value == pytest.approx(float(theirs.compute()[0]), abs=1e-4)


def test_precision_and_recall_are_the_papers() -> None:
    drawn, real = RNG.normal(size=(60, 3)) + 0.6, RNG.normal(size=(50, 3)) * 1.4
    found = metrics.precision_recall(drawn, real)
    assert found.precise.tolist() == [in_manifold(point, real, 3) for point in drawn]
    assert found.recalled.tolist() == [in_manifold(point, drawn, 3) for point in real]
    assert 0.1 < found.recalled.mean() < 0.9


# --- FID of small samples ---------------------------------------------------------------------------------------------


def test_a_true_zero_is_not_reported_as_seven() -> None:
    rng = np.random.default_rng(4)
    drawn, real = rng.normal(size=(5000, 256)), rng.normal(size=(5000, 256))
    with pytest.raises(metrics.TooFewError, match=r"5,000 drawn.*--small-sample"):
        metrics.fid_estimate(drawn, real)
    found = metrics.fid_estimate(drawn, real, small_sample=True)
    assert found.raw > 6  # what a plain FID would have said
    assert found.estimate.low == 0
    assert found.estimate.value < 0.3
    assert found.estimate.high < 1
    assert "plain FID would say 6." in found.estimate.note


@pytest.mark.parametrize(("pictures", "true"), [(1000, 0.0), (1000, 0.2), (1000, 1.0)])
def test_the_small_sample_interval_covers(pictures: int, true: float) -> None:
    rng = np.random.default_rng(5)
    inside, middles = 0, []
    for _ in range(40):
        drawn, real = rng.normal(size=(pictures, 24)), rng.normal(size=(pictures, 24))
        real[:, 0] += true**0.5
        found = metrics.fid_estimate(drawn, real, small_sample=True)
        middles.append(found.estimate.value)
        inside += found.estimate.low <= true <= found.estimate.high
        assert found.raw > found.estimate.value
    assert inside >= 35
    assert np.mean(middles) == pytest.approx(true, abs=0.05)


def test_a_bootstrap_of_fid_would_not_cover() -> None:
    """Why there is none: it lies above the plain figure, which lies above the truth."""
    rng = np.random.default_rng(6)
    drawn, real = rng.normal(size=(600, 24)), rng.normal(size=(600, 24))
    again = [metrics.fid(drawn[rng.integers(600, size=600)], real[rng.integers(600, size=600)]) for _ in range(60)]
    low = np.quantile(again, 0.025)
    assert low > metrics.fid(drawn, real) > 0.5
    assert metrics.fid_estimate(drawn, real, small_sample=True).estimate.low < 0.05


def test_ten_thousand_pictures_have_a_plain_fid_without_an_interval() -> None:
    rng = np.random.default_rng(7)
    found = metrics.fid_estimate(rng.normal(size=(10_000, 4)), rng.normal(size=(10_000, 4)))
    assert not found.extrapolated
    assert (found.estimate.low, found.estimate.high) == (None, None)


def test_fewer_pictures_than_dimensions_are_not_trusted() -> None:
    rng = np.random.default_rng(8)
    found = metrics.fid_estimate(rng.normal(size=(200, 64)), rng.normal(size=(200, 64)), small_sample=True)
    assert "not to be trusted" in found.estimate.note
    with pytest.raises(metrics.TooFewError, match="at least 80"):
        metrics.fid_estimate(rng.normal(size=(79, 8)), rng.normal(size=(79, 8)), small_sample=True)


# --- planted collapse -------------------------------------------------------------------------------------------------


def test_collapse_is_caught_by_recall_and_diversity_and_missed_by_inception_score() -> None:
    rng = np.random.default_rng(9)
    real, sound = rng.normal(size=(500, 12)), rng.normal(size=(500, 12))
    collapsed = np.repeat(rng.normal(size=(10, 12)), 50, axis=0)  # ten pictures, fifty times each
    recall = {name: metrics.precision_recall(x, real).recalled.mean() for name, x in _named(sound, collapsed)}
    precision = metrics.precision_recall(collapsed, real).precise.mean()
    assert recall["sound"] > 0.8
    assert recall["collapsed"] < 0.05
    assert precision > 0.5
    effective = {name: metrics.diversity(x).effective for name, x in _named(sound, collapsed)}
    assert effective["collapsed"] < 10 < effective["sound"]
    # One perfect picture a class: Inception Score is as high as it can be.
    assert metrics.inception_score(20.0 * np.tile(np.eye(10), (20, 1)), 1).value == pytest.approx(10, rel=1e-3)


def _named(sound: np.ndarray, collapsed: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [("sound", sound), ("collapsed", collapsed)]


def test_effective_pictures_are_those_that_differ() -> None:
    assert metrics.diversity(np.ones((20, 5)) * 0.3).effective == 1
    apart = np.vstack([np.eye(8), -np.eye(8)])  # eight directions, both ways: centred already
    assert metrics.diversity(apart).effective == pytest.approx(8)
    assert metrics.diversity(np.tile(apart, (3, 1))).effective == pytest.approx(8)


def test_drawings_of_one_prompt_are_compared_with_each_other() -> None:
    alike, unlike = [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]
    spread, of = metrics.within_prompts(np.array([*alike, *unlike, [1.0, 1.0]]), ["a", "a", "b", "b", "alone"])
    assert of == ["a", "b"]
    assert spread.tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("broken", [np.full((5, 2), np.nan), np.zeros((1, 2)), np.zeros(7)])
def test_broken_features_are_refused(broken: Any) -> None:
    with pytest.raises(ValueError, match="features"):
        metrics.fid(broken, np.zeros((5, 2)))
