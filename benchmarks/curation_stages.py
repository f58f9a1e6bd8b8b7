"""A stage for the benchmarks: CLIP's fast preprocessing without its tower, which on a CPU would hide all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.clip_score import fast_pixels
from stages.contract import Batch, Column, Columns, Context, Measure, Stage
from stages.decode import REDUCED_SIDE


@dataclass(frozen=True, kw_only=True)
class ClipPixels(Stage):
    """total: the sum of the 224 x 224 x 3 bytes that a CLIP would be given."""

    type: ClassVar[str] = "clip_pixels"
    adds: ClassVar[tuple[Column, ...]] = (Column("total", "int64"),)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            totals: list[Any] = []
            for row in range(len(batch)):
                pixels_YXC = batch.reduced(row, REDUCED_SIDE)
                totals.append(None if pixels_YXC is None else int(fast_pixels(pixels_YXC, REDUCED_SIDE).sum()))
            return Columns({"total": totals}, [batch.image_error(row) for row in range(len(batch))])

        return measure


def register() -> None:
    """Make the stage known to recipes of this process."""
    from pipelines.recipe import STAGE_TYPES

    STAGE_TYPES[ClipPixels.type] = "curation_stages:ClipPixels"


def main(arguments: Sequence[str]) -> None:
    """`sluice` with that stage."""
    import sys

    from pipelines.cli import main as sluice

    register()
    sys.argv = ["sluice", *arguments]
    sluice()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
