"""Flat pictures: how much there is to see, from the grey levels of a small copy.

    stages:
      entropy: {}                             # entropy.bits, entropy.flat
    rules:
      flat: {column: entropy.flat, at_most: 0.9}

Plain backgrounds, placeholders and scanned blanks pass every size rule and teach nothing; their perceptual hashes
collide besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stages.contract import Batch, Column, Columns, Context, Measure, Stage
from stages.decode import upright_rgb

SIDE_PX = 128
TILE_PX = 8
# Grey levels between a tile's darkest and brightest pixel up to which it counts as flat: JPEG's own noise is as much.
FLAT_LEVELS = 6


@dataclass(frozen=True, kw_only=True)
class Entropy(Stage):
    """Shannon entropy of grey levels, 0 (one level) to 8 bits; and the share of 8 px tiles without structure."""

    type: ClassVar[str] = "entropy"
    cpu_ms_per_row: ClassVar[float] = 1.0
    adds: ClassVar[tuple[Column, ...]] = (
        Column("bits", "float32", "bits", "0..8"),
        Column("flat", "float32", scale="share of the area 0..1"),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            bits: list[Any] = [None] * len(batch)
            flat: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                picture = batch.image(row)
                if picture is None:
                    errors[row] = batch.image_error(row) or "no picture"
                    continue
                small = upright_rgb(picture).convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
                grey_HW = np.asarray(small)
                bits[row], flat[row] = entropy_bits(grey_HW), flat_share(grey_HW)
            return Columns({"bits": bits, "flat": flat}, errors)

        return measure


def entropy_bits(grey_HW: np.ndarray) -> float:
    """Shannon entropy of the histogram of uint8 grey levels, in bits."""
    counts = np.bincount(grey_HW.ravel(), minlength=256)
    shares = counts[counts > 0] / grey_HW.size
    return float(max(-(shares * np.log2(shares)).sum(), 0.0))


def flat_share(grey_HW: np.ndarray) -> float:
    """The share of TILE_PX x TILE_PX tiles whose grey levels differ by no more than FLAT_LEVELS."""
    rows, columns = (side // TILE_PX for side in grey_HW.shape)
    tiles = grey_HW[: rows * TILE_PX, : columns * TILE_PX].reshape(rows, TILE_PX, columns, TILE_PX)
    spread = tiles.max(axis=(1, 3)).astype(int) - tiles.min(axis=(1, 3))
    return float((spread <= FLAT_LEVELS).mean())
