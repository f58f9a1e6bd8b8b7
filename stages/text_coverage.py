"""Text in the picture: the share of its area that written text covers, found by rapidocr's detector where installed.

    stages:
      writing: {type: text_coverage}          # writing.coverage, writing.boxes
    rules:
      writing: {column: writing.coverage, at_most: 0.2}

What it is for: screenshots, slides and adverts teach a model to draw letters badly, so a rule may drop them; a picture
with writing must not be flipped in training (mirrored letters are no letters); and coverage orders curricula, pictures
without writing first. Letters are found, not read: only the detector runs.

`pip install rapidocr onnxruntime`, or Sluice with the extra `ocr`; the package brings its weights with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.decode import upright_rgb

# A detector's view: larger pictures are reduced to this before it looks, as it would do itself.
LONG_SIDE_PX = 960


@dataclass(frozen=True, kw_only=True)
class TextCoverage(Stage):
    """Share of the picture's area inside text boxes (overlaps counted once), and how many boxes there are."""

    type: ClassVar[str] = "text_coverage"
    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=1 << 30)
    cpu_ms_per_row: ClassVar[float] = 1000.0
    adds: ClassVar[tuple[Column, ...]] = (
        Column("coverage", "float32", scale="share of the area 0..1"),
        Column("boxes", "int32", "boxes"),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def weights(self, context: Context) -> Mapping[str, Path]:
        """The package's own weights. Raises FileNotFoundError where it is not installed."""
        spec = importlib.util.find_spec("rapidocr")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "text_coverage: the package rapidocr is not installed here; pip install rapidocr onnxruntime"
            )
        files = sorted((Path(spec.submodule_search_locations[0]) / "models").glob("*_det_*.onnx"))
        return {file.name: file for file in files}

    def open(self, context: Context) -> Measure:
        self.weights(context)
        from rapidocr import RapidOCR

        engine = RapidOCR(params={"Global.log_level": "critical"})

        def measure(batch: Batch) -> Columns:
            coverage: list[Any] = [None] * len(batch)
            counts: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                picture = batch.image(row)
                if picture is None:
                    errors[row] = batch.image_error(row) or "no picture"
                    continue
                picture = upright_rgb(picture)
                picture.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX))
                pixels_HWC = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
                found = engine(pixels_HWC, use_det=True, use_cls=False, use_rec=False)
                boxes = [] if found.boxes is None else [np.asarray(box, float) for box in found.boxes]
                coverage[row], counts[row] = covered(picture.size, boxes), len(boxes)
            return Columns({"coverage": coverage, "boxes": counts}, errors)

        return measure


def covered(size: tuple[int, int], boxes: Sequence[np.ndarray]) -> float:
    """The share of a (width, height) picture that polygons of corners (N, 2), in pixels, cover together."""
    mask = Image.new("1", size)
    pen = ImageDraw.Draw(mask)
    for box in boxes:
        pen.polygon([(float(x), float(y)) for x, y in box], fill=1)
    return float(np.asarray(mask).mean())
