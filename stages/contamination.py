"""Contamination: rows that are in a benchmark, by their image or by their caption.

    rules:
      contamination: {type: contamination, on_match: mark}

    sluice curate recipe.yaml --against geneval.tsv --against benchmark-images/

Every row is held against the benchmark's rows alone, never against another row: an equal image, a near one (within
`radius` bits, confirmed by the second look), or the same caption but for case, spacing and punctuation. A match is
dropped, or kept and marked: then the rule is named among the row's failed_rules.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from stages.dedupe import NearDuplicates, held_rows
from stages.hamming import iterate_pairs
from stages.rules import Rule, Table, Verdicts


@dataclass(frozen=True, kw_only=True)
class Contamination(Rule):
    """Drops or marks rows that a benchmark holds.

    on_match: "drop" or "mark". captions: a caption that is one of the benchmark's is a match. radius, second_look: as
    for near_duplicates; images: false leaves pictures out, for recipes that hash none.
    """

    type: ClassVar[str] = "contamination"
    barrier: ClassVar[bool] = True
    takes_benchmarks: ClassVar[bool] = True
    on_match: Literal["drop", "mark"] = "drop"
    captions: bool = True
    images: bool = True
    hash: str = "hash.phash64"
    thumbnail: str = "hash.thumbnail"
    pixels: str = "decode.pixels"
    radius: int = 8
    second_look: float | None = 0.04

    def __post_init__(self) -> None:
        self._near()
        if not self.captions and not self.images:
            raise ValueError("a contamination rule looks at images, at captions or at both")

    @property
    def marks(self) -> bool:  # type: ignore[override]
        return self.on_match == "mark"

    @property
    def needs(self) -> tuple[str, ...]:
        images = ("image_id", *self._near().needs) if self.images else ()
        return (*images, "caption")

    def threshold_text(self) -> str:
        return f"not in a benchmark ({self.on_match})"

    def _near(self) -> NearDuplicates:
        return NearDuplicates(
            hash=self.hash,
            thumbnail=self.thumbnail,
            pixels=self.pixels,
            radius=self.radius,
            second_look=self.second_look,
        )

    def judge(self, table: Table) -> Verdicts:
        held = held_rows(table)
        keeper = np.full(len(held), -1, np.int64)
        distance = np.full(len(held), np.nan)
        reasons: dict[int, str] = {}
        if self.captions:
            self._same_captions(table, held, keeper, reasons)
        if self.images:
            self._near_images(table, held, keeper, distance, reasons)
            _same_values(table["image_id"], held, keeper, distance, reasons)
        rejected = keeper >= 0
        cut: dict[str, Any] = {
            "benchmark_rows": int(held.sum()),
            "matches": int(rejected.sum()),
            "matched_benchmark_rows": len(np.unique(keeper[rejected])),
        }
        return Verdicts(rejected, distance, float(self.radius), reasons, keeper=keeper, distance=distance, cut=cut)

    def _same_captions(self, table: Table, held: np.ndarray, keeper: np.ndarray, reasons: dict[int, str]) -> None:
        plain = [plain_caption(text) for text in table["caption"].tolist()]
        first: dict[str, int] = {}
        for row in np.flatnonzero(held).tolist():
            if plain[row]:
                first.setdefault(plain[row], row)
        for row in np.flatnonzero(~held).tolist():
            if (found := first.get(plain[row])) is not None:
                keeper[row], reasons[row] = found, "the same caption"

    def _near_images(
        self, table: Table, held: np.ndarray, keeper: np.ndarray, distance: np.ndarray, reasons: dict[int, str]
    ) -> None:
        near = self._near()
        # Rows of a list of prompts have no picture: their hash stands for nothing.
        pictured = np.flatnonzero(table[self.pixels].astype(np.int64) > 0)
        hashes, looks = table[self.hash][pictured].astype(np.uint64), near.looks(table)[pictured]
        for left, right, bits in iterate_pairs(hashes, self.radius):
            # Of each pair, the benchmark's row first.
            flipped = held[pictured[right]]
            one, other = np.where(flipped, right, left), np.where(flipped, left, right)
            across = held[pictured[one]] & ~held[pictured[other]]
            one, other, bits = one[across], other[across], bits[across]
            same = near.looks_same(looks[one], looks[other])
            for benchmark, row, away in zip(pictured[one[same]], pictured[other[same]], bits[same], strict=True):
                # The nearest one is told, of equally near ones the first.
                if not np.isfinite(distance[row]) or (away, benchmark) < (distance[row], keeper[row]):
                    keeper[row], distance[row], reasons[int(row)] = benchmark, away, f"{away} bits from its image"


def _same_values(
    values: np.ndarray, held: np.ndarray, keeper: np.ndarray, distance: np.ndarray, reasons: dict[int, str]
) -> None:
    first: dict[str, int] = {}
    for row in np.flatnonzero(held).tolist():
        if values[row]:
            first.setdefault(values[row], row)
    for row in np.flatnonzero(~held).tolist():
        if (found := first.get(values[row])) is not None:
            keeper[row], distance[row], reasons[row] = found, 0.0, "the same image bytes"


def plain_caption(text: str | None) -> str:
    """A caption without what does not tell two apart: case, width, punctuation, spacing."""
    folded = unicodedata.normalize("NFKC", text or "").casefold()
    return " ".join(re.findall(r"\w+", folded))
