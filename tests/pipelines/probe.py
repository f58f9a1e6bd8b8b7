"""A model stage small enough to follow: its numbers depend on the batch they are computed in, as real models' do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from stages.contract import Batch, Column, Columns, Context, Measure, PreparedMeasure, Stage


@dataclass(frozen=True, kw_only=True)
class Probe(Stage):
    """score: mean brightness plus a hundredth for each other row in the batch; SLUICE_PROBE_LOG notes every batch."""

    type: ClassVar[str] = "probe"
    adds: ClassVar[tuple[Column, ...]] = (Column("score", "float32"), Column("batch", "int32"))
    compute_batch: int = field(default=16, kw_only=True)
    fail_on: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "caption")

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            if log := os.environ.get("SLUICE_PROBE_LOG"):
                with Path(log).open("a") as stream:
                    stream.write(f"{len(batch)}\n")
            scores, errors = [], []
            for row in range(len(batch)):
                image = batch.image(row)
                # SLUICE_PROBE_FAIL stands for trouble that passes: a remote model that did not answer.
                reasons = (self.fail_on, os.environ.get("SLUICE_PROBE_FAIL", ""))
                broken = any(reason and reason in (batch["caption"][row] or "") for reason in reasons)
                errors.append("asked to fail" if broken else None)
                mean = sum(image.convert("L").tobytes()) / (image.width * image.height) if image else 0.0
                scores.append(None if broken else mean + len(batch) / 100)
            batches = [None if error else len(batch) for error in errors]
            return Columns({"score": scores, "batch": batches}, errors)

        return measure


class _InTwoHalves(PreparedMeasure):
    def __init__(self, stage: PreparedProbe) -> None:
        self.stage = stage

    def prepare(self, batch: Batch, row: int) -> float:
        image = batch.image(row)
        return sum(image.convert("L").tobytes()) / (image.width * image.height) if image else 0.0

    def compute(self, prepared: Sequence[float]) -> Columns:
        if self.stage.fail_on:
            raise ValueError("the model broke")
        scores = [mean + len(prepared) / 100 for mean in prepared]
        return Columns({"score": scores, "batch": [len(prepared)] * len(prepared)})


@dataclass(frozen=True, kw_only=True)
class PreparedProbe(Probe):
    """The probe in two halves: its rows are made ready in other threads. fail_on, if set: every batch fails."""

    type: ClassVar[str] = "prepared_probe"

    def open(self, context: Context) -> Measure:
        return _InTwoHalves(self)
