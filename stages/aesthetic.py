"""Aesthetic score: a small head over CLIP image embeddings that are already measured.

    stages:
      clip:      {type: clip_score, model: ViT-L-14, pretrained: openai}
      aesthetic: {type: aesthetic, head: sac+logos+ava1-l14-linearMSE.pth, embedding: clip.image_embedding}

`head` is LAION's improved predictor (768-1024-128-64-16-1), one of LAION's linear heads (B/16, B/32, L/14), or the same
layouts as safetensors. None of these has an activation between its layers (the improved predictor's published module
leaves them out, and its weights were trained so), and dropout does nothing when scoring: the whole head is one affine
map, multiplied out when opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stages.contract import Column
from stages.heads import HeadStage, Layers, affine_of


@dataclass(frozen=True, kw_only=True)
class Aesthetic(HeadStage):
    """Aesthetic score on the head's scale (LAION's: about 1 to 10, most web pictures 4 to 6; 0 and 11 do occur)."""

    type: ClassVar[str] = "aesthetic"
    version: ClassVar[int] = 2  # 2: the embedding is divided by its length before the product, not after
    adds: ClassVar[tuple[Column, ...]] = (Column("score", "float32", scale="about 1..10"),)

    def scorer(self, layers: Layers, name: str) -> Callable[[np.ndarray], float]:
        if len(layers[-1][0]) != 1:
            raise ValueError(f"aesthetic: {name} ends in {len(layers[-1][0])} numbers instead of one score")
        weight_D, bias = affine_of(layers)
        return lambda e_D: float((e_D * weight_D).sum()) + bias
