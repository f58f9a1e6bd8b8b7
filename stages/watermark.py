"""Watermarks: the probability that a picture carries one, by a classifier head over CLIP image embeddings.

    stages:
      watermark: {head: watermark_l14.safetensors, embedding: clip.image_embedding}
    rules:
      watermark: {column: watermark.score, at_most: 0.8}

`head` is a chain of Linear layers in .safetensors or .pth: see `stages.heads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stages.contract import Column
from stages.heads import Classifier


@dataclass(frozen=True, kw_only=True)
class Watermark(Classifier):
    """Probability of a visible watermark."""

    type: ClassVar[str] = "watermark"
    adds: ClassVar[tuple[Column, ...]] = (Column("score", "float32", scale="probability 0..1"),)
