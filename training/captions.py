"""Which of a sample's captions an epoch learns from.

    captions: {weighting: power, temperature: 0.1, threshold: 25, synthetic_fraction: 0.5}     # in a training recipe

A sample may have its original caption, alternatives that came with it and synthetic ones. Four steps leave one:

    length      captions of more words than the epoch allows wait for a later one (the shortest stays, come what may)
    threshold   captions whose CLIP score is lower leave (the best one stays)
    blend       where both kinds are left: a synthetic one with probability `synthetic_fraction`, else an original
    weight      one of what is left: all alike, or by score s (100·cosine) and temperature T,
                softmax  p_i = exp(s_i / T) / Σ_j exp(s_j / T)               (SANA's paper)
                power    p_i = s_i^(1/T) / Σ_j s_j^(1/T), T at least 0.01     (SANA's code)

The power law does not care about the scale of scores, the softmax does: that is why scores are fixed to 100·cosine. A
caption without a score has no weight where others have one. The choice is a function of (seed, epoch, uid): neither the
number of workers nor a resumed run changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.recipe import CaptionOptions

SCORE_SCALE = 100.0
LEAST_TEMPERATURE = 0.01
USABLE = ("ok", "success")  # statuses of the captions table whose text is a caption


@dataclass(frozen=True)
class Caption:
    """A caption of the captions table. source: "original", "alternative" or "synthetic"; score: CLIP's cosine."""

    text: str
    source: str = "original"
    score: float | None = None

    @property
    def is_synthetic(self) -> bool:
        return self.source == "synthetic"

    @property
    def words(self) -> int:
        return len(self.text.split())


def usable_captions(rows: Iterable[Mapping[str, Any]]) -> list[Caption]:
    """The captions of one uid that may be learnt from, each once, in an order that depends on them alone."""
    found = {row["caption_id"]: row for row in rows if row["status"] in USABLE and (row["text"] or "").strip()}
    return [Caption(row["text"], row["source"], row["clip_score"]) for _, row in sorted(found.items())]


class CaptionSampler:
    """Chooses one of a sample's captions by (seed, epoch, uid)."""

    def __init__(self, options: CaptionOptions, seed: int) -> None:
        self.options, self.seed = options, seed

    def choose(self, captions: Sequence[Caption], uid: str, epoch: int) -> Caption:
        """One of `captions` (at least one)."""
        blend, draw = self._uniforms(uid, epoch)
        left = self._of_kind(self._above_threshold(self._short_enough(captions, epoch)), blend)
        ends = np.cumsum(self.weights(left))
        return left[min(int(np.searchsorted(ends, draw * ends[-1], side="right")), len(left) - 1)]

    def words_at(self, epoch: int) -> int | None:
        """Most words of a caption in this epoch: from the first limit to the last in equal steps, then no limit."""
        first, last, epochs = self.options.words_first, self.options.words_last, self.options.words_epochs
        if first is None or last is None or epoch >= epochs:
            return None
        return round(first + (last - first) * epoch / max(1, epochs - 1))

    def weights(self, captions: Sequence[Caption]) -> np.ndarray:
        """(N,) probabilities, summing to 1."""
        given = [caption.score for caption in captions]
        if self.options.weighting == "uniform" or all(score is None for score in given):
            return np.full(len(captions), 1 / len(captions))
        scores_N = np.array([np.nan if score is None else score * SCORE_SCALE for score in given])
        with np.errstate(divide="ignore"):
            logs_N = (
                scores_N / self.options.temperature
                if self.options.weighting == "softmax"
                else np.log(np.maximum(scores_N, 0)) / max(self.options.temperature, LEAST_TEMPERATURE)
            )
        logs_N = np.where(np.isnan(scores_N), -np.inf, logs_N)
        if np.isneginf(logs_N).all():  # no score above 0: a power law has nothing to weigh by
            logs_N = np.where(np.isnan(scores_N), -np.inf, 0.0)
        weights_N = np.exp(logs_N - logs_N.max())
        return weights_N / weights_N.sum()

    def _short_enough(self, captions: Sequence[Caption], epoch: int) -> Sequence[Caption]:
        most = self.words_at(epoch)
        if most is None:
            return captions
        fitting = [caption for caption in captions if caption.words <= most]
        return fitting or [min(captions, key=lambda caption: caption.words)]

    def _above_threshold(self, captions: Sequence[Caption]) -> Sequence[Caption]:
        scored = [(caption.score * SCORE_SCALE, caption) for caption in captions if caption.score is not None]
        if self.options.threshold is None or not scored:
            return captions
        passing = [caption for score, caption in scored if score >= self.options.threshold]
        return passing or [max(scored, key=lambda pair: pair[0])[1]]

    def _of_kind(self, captions: Sequence[Caption], blend: float) -> Sequence[Caption]:
        fraction = self.options.synthetic_fraction
        synthetic = [caption for caption in captions if caption.is_synthetic]
        if fraction is None or len(synthetic) in (0, len(captions)):
            return captions
        return synthetic if blend < fraction else [caption for caption in captions if not caption.is_synthetic]

    def _uniforms(self, uid: str, epoch: int) -> tuple[float, float]:
        """Two independent numbers, even in [0, 1)."""
        digest = hashlib.blake2b(f"captions/{self.seed}/{epoch}/{uid}".encode(), digest_size=16).digest()
        first, second = (int.from_bytes(part, "little") >> 11 for part in (digest[:8], digest[8:]))
        return first / 2**53, second / 2**53
