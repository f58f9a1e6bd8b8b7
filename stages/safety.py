"""Safety: the probability that a picture is unsafe to show, by a head over CLIP embeddings or by nudenet's detector.

    stages:
      safety: {head: nsfw_l14.safetensors, embedding: clip.image_embedding}    # safety.score: probability
      nudity: {type: nudenet}                                                  # nudity.score, nudity.labels
    rules:
      safe: {column: safety.score, at_most: 0.3}

`head` is a chain of Linear layers in .safetensors or .pth: see `stages.heads`. nudenet is a package of its own
(`pip install nudenet`, or Sluice with the extra `safety`) and brings its weights with it.

Reports never embed a picture that a rule over one of these columns dropped, nor one that such a rule could not judge.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.decode import upright_rgb
from stages.heads import Classifier

# What nudenet calls bare and most people would not want to see unasked; feet, bellies and armpits are not among it.
EXPOSED = (
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
NUDENET_FILE = "320n.onnx"


@dataclass(frozen=True, kw_only=True)
class Safety(Classifier):
    """Probability that a picture is unsafe, by the classes that the head was trained on."""

    type: ClassVar[str] = "safety"
    adds: ClassVar[tuple[Column, ...]] = (Column("score", "float32", scale="probability 0..1"),)


@dataclass(frozen=True, kw_only=True)
class NudeNet(Stage):
    """nudenet's surest detection of a class in `EXPOSED` (0 where there is none), and all classes found."""

    type: ClassVar[str] = "nudenet"
    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=512 << 20)
    cpu_ms_per_row: ClassVar[float] = 150.0
    adds: ClassVar[tuple[Column, ...]] = (
        Column("score", "float32", scale="confidence 0..1"),
        Column("labels", "string"),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def weights(self, context: Context) -> Mapping[str, Path]:
        """The detector inside the installed package. Raises FileNotFoundError where it is not installed."""
        spec = importlib.util.find_spec("nudenet")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("nudenet: the package is not installed here; pip install nudenet")
        return {NUDENET_FILE: Path(spec.submodule_search_locations[0]) / NUDENET_FILE}

    def open(self, context: Context) -> Measure:
        self.weights(context)
        from nudenet import NudeDetector

        detector = NudeDetector()

        def measure(batch: Batch) -> Columns:
            scores: list[Any] = [None] * len(batch)
            labels: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                picture = batch.image(row)
                if picture is None:
                    errors[row] = batch.image_error(row) or "no picture"
                    continue
                # OpenCV's order of channels, as the package itself reads files.
                pixels_HWC = np.ascontiguousarray(np.asarray(upright_rgb(picture))[:, :, ::-1])
                found = {one["class"]: float(one["score"]) for one in _weakest_first(detector.detect(pixels_HWC))}
                scores[row] = max((found.get(name, 0.0) for name in EXPOSED), default=0.0)
                labels[row] = ", ".join(sorted(found))
            return Columns({"score": scores, "labels": labels}, errors)

        return measure


def _weakest_first(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(detections, key=lambda one: float(one["score"]))
