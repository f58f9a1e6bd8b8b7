"""Is what the prompt asks for in the picture? Objects, counts, colours and positions, by any detector.

    verdict = judge(prompt, detector.detect(picture))       # Verdict(object=True, count=True, colour=False, ...)

The logic is GenEval's (Ghosh et al., 2023): enough objects of each class, no more than are allowed, the colour of each,
and positions by centres, with a dead zone of a tenth of the two objects' sizes. A detector is anything with `detect`;
for the made-up world it is the exact reader of pixels.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from stages.contract import Batch, Column, Columns, Context, Measure, Stage
from stages.decode import upright_rgb
from training.evaluation.suites import Prompt

if TYPE_CHECKING:
    from PIL import Image

DEAD_ZONE = 0.1  # of the two objects' sizes, as GenEval has it
SIDEWAYS = 0.5  # share of the way that must point in a direction
ASPECTS = ("object", "count", "colour", "position")


@dataclass(frozen=True)
class Detection:
    """An object in a picture: class, colour ("" unknown), centre and size as fractions of the picture's sides."""

    thing: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    score: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What of a prompt a picture shows; None for what the prompt does not ask. reasons: what is wrong, in words."""

    object: bool | None = None
    count: bool | None = None
    colour: bool | None = None
    position: bool | None = None
    reasons: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        return all(getattr(self, aspect) is not False for aspect in ASPECTS)


class Detector(Protocol):
    """Finds objects in an upright RGB picture. things: classes it can tell, None for any."""

    things: frozenset[str] | None

    def detect(self, picture: Image.Image) -> list[Detection]: ...


def judge(prompt: Prompt, found: Sequence[Detection]) -> Verdict:
    """Whether a picture with these objects shows what the prompt asks for."""
    reasons: list[str] = []
    results: dict[str, list[bool]] = {aspect: [] for aspect in ASPECTS}
    chosen: list[list[Detection]] = []
    for asked in prompt.asked:
        alike = [one for one in found if asked.thing in ("", one.thing)]
        coloured = [one for one in alike if asked.colour in ("", one.colour)]
        name = f"{asked.colour} {asked.thing or 'object'}".strip()
        results["object"].append(bool(alike))
        if not alike:
            reasons.append(f"no {asked.thing or 'object'}")
        if asked.colour:
            results["colour"].append(len(coloured) >= min(asked.count, max(len(alike), 1)))
            if alike and not coloured:
                reasons.append(f"no {asked.thing or 'object'} is {asked.colour}")
        if asked.count > 1:
            results["count"].append(len(coloured) >= asked.count)
            if alike and len(coloured) < asked.count:
                reasons.append(f"{len(coloured)} of {asked.count} {name}s")
        chosen.append(sorted(coloured, key=lambda one: -one.score)[: asked.count])
    for asked, mine in zip(prompt.asked, chosen, strict=True):
        if asked.relation:
            others = chosen[asked.to]
            stands = any(stands_as(asked.relation, one, other) for one in mine for other in others if one != other)
            results["position"].append(stands)
            if mine and others and not stands:
                reasons.append(f"{asked.thing or 'object'} not {asked.relation} {prompt.asked[asked.to].thing}")
    for asked in prompt.forbidden:
        mine = [one for one in found if asked.thing in ("", one.thing) and asked.colour in ("", one.colour)]
        results["count"].append(len(mine) < asked.count)
        if len(mine) >= asked.count:
            name = f"{asked.colour} {asked.thing or 'object'}".strip() + ("s" if len(mine) > 1 else "")
            allowed = f"at most {asked.count - 1} asked" if asked.count > 1 else "none asked"
            reasons.append(f"{len(mine)} {name}, {allowed}")
    said = {aspect: all(values) if values else None for aspect, values in results.items()}
    return Verdict(**said, reasons=tuple(reasons))


def stands_as(relation: str, one: Detection, other: Detection) -> bool:
    """Whether `one` stands <relation> `other`, by their centres less a tenth of their sizes."""
    across, down = one.x - other.x, one.y - other.y
    length = math.hypot(across, down)
    if length == 0:
        return False
    across = math.copysign(max(abs(across) - DEAD_ZONE * (one.width + other.width), 0), across) / length
    down = math.copysign(max(abs(down) - DEAD_ZONE * (one.height + other.height), 0), down) / length
    return {
        "left of": across < -SIDEWAYS,
        "right of": across > SIDEWAYS,
        "above": down < -SIDEWAYS,
        "below": down > SIDEWAYS,
    }[relation]


def can_judge(detector: Detector, prompt: Prompt) -> bool:
    """Whether the detector knows every class that the prompt speaks of."""
    named = {asked.thing for asked in (*prompt.asked, *prompt.forbidden) if asked.thing}
    return prompt.checkable and (detector.things is None or named <= detector.things)


# --- detectors --------------------------------------------------------------------------------------------------------


class PixelReader:
    """The made-up world's own checker: exact, and independent of every model."""

    def __init__(self) -> None:
        from pipelines.demo.world import SHAPES

        self.things: frozenset[str] | None = frozenset(SHAPES)

    def detect(self, picture: Image.Image) -> list[Detection]:
        import numpy as np

        from pipelines.demo.checker import find_objects

        width, height = picture.size
        # The checker measures in units of the shorter side.
        side = min(picture.size)
        return [
            Detection(one.shape, one.colour, one.x * side / width, one.y * side / height,
                      one.area**0.5 * side / width, one.area**0.5 * side / height, 1 - one.misfit)
            for one in find_objects(np.asarray(picture))
        ]  # fmt: skip


class ObjectDetector:
    """Any object detector that transformers saved in a folder; colours by the nearest named one to a box's middle."""

    things: frozenset[str] | None

    def __init__(self, folder: Path, device: str = "cpu", threshold: float = 0.3) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
        loaded: Any = AutoModelForObjectDetection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model = loaded.eval().to(device)
        self.threshold, self.device = threshold, device
        self.names = {int(place): str(name) for place, name in self.model.config.id2label.items()}
        self.things = frozenset(self.names.values())

    def detect(self, picture: Image.Image) -> list[Detection]:
        import torch

        width, height = picture.size
        with torch.inference_mode():
            answer = self.model(**self.processor(images=picture, return_tensors="pt").to(self.device))
        (found,) = self.processor.post_process_object_detection(answer, self.threshold, [(height, width)])
        detections = []
        for score, label, box in zip(found["scores"], found["labels"], found["boxes"].tolist(), strict=True):
            left, top, right, bottom = box
            detections.append(
                Detection(
                    self.names[int(label)],
                    _colour_of(picture, box),
                    (left + right) / 2 / width,
                    (top + bottom) / 2 / height,
                    (right - left) / width,
                    (bottom - top) / height,
                    float(score),
                )
            )
        return detections


# CSS's values of GenEval's eleven colours; the nearest one in RGB to the middle of a box names it.
NAMED = {
    "red": (255, 0, 0), "orange": (255, 165, 0), "yellow": (255, 255, 0), "green": (0, 128, 0), "blue": (0, 0, 255),
    "purple": (128, 0, 128), "pink": (255, 192, 203), "brown": (139, 69, 19), "black": (0, 0, 0),
    "white": (255, 255, 255), "gray": (128, 128, 128),
}  # fmt: skip


def _colour_of(picture: Image.Image, box: Sequence[float]) -> str:
    """The name nearest to the median colour of the middle half of a box. Rougher than a CLIP over crops."""
    import numpy as np

    left, top, right, bottom = box
    quarter_x, quarter_y = (right - left) / 4, (bottom - top) / 4
    inside = picture.crop((left + quarter_x, top + quarter_y, right - quarter_x, bottom - quarter_y))
    pixels = np.asarray(inside, np.float64).reshape(-1, 3)
    if not len(pixels):
        return ""
    colour = np.median(pixels, axis=0)
    return min(NAMED, key=lambda name: float(np.linalg.norm(colour - np.array(NAMED[name]))))


def open_detector(name: str, context: Context) -> Detector:
    """ "made_up", a folder of a detector that transformers saved, or "module:name" of a class of the user's own."""
    if name == "made_up":
        return PixelReader()
    module, colon, attribute = name.partition(":")
    if colon and module.replace(".", "").replace("_", "").isalnum() and "/" not in name:
        return getattr(importlib.import_module(module), attribute)()
    return ObjectDetector(context.find(name), context.device)


# --- as a stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Composition(Stage):
    """Verdicts on every drawing whose prompt can be checked; None for the others. What was found, also for prompts of
    the suite "bias", which ask for nothing in particular.

    The column `prompt` holds Prompt.to_json() of each row.
    """

    type: ClassVar[str] = "composition"
    adds: ClassVar[tuple[Column, ...]] = (
        *(Column(aspect, "bool") for aspect in ASPECTS),
        Column("right", "bool"),
        Column("reasons", "string"),
        Column("found", "string", scale="JSON: [[thing, colour], ...]"),
    )
    path_options: ClassVar[tuple[str, ...]] = ("detector",)
    detector: str = "made_up"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "prompt")

    def weights(self, context: Context) -> Mapping[str, Path]:
        if self.detector == "made_up" or ":" in self.detector:
            return {}
        return {path.name: path for path in sorted(context.find(self.detector).glob("*.safetensors"))}

    def open(self, context: Context) -> Measure:
        detector = open_detector(self.detector, context)
        names = [column.name for column in self.adds]

        def measure(batch: Batch) -> Columns:
            values: dict[str, list[Any]] = {name: [None] * len(batch) for name in names}
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                prompt, picture = Prompt.from_json(batch["prompt"][row]), batch.image(row)
                checked = can_judge(detector, prompt)
                if not checked and prompt.suite != "bias":
                    continue
                try:
                    if picture is None:
                        raise ValueError(batch.image_error(row) or "no picture")
                    found = detector.detect(upright_rgb(picture))
                    verdict = judge(prompt, found)
                except Exception as problem:  # one odd drawing costs that drawing
                    errors[row] = f"{type(problem).__name__}: {problem}"[:200]
                    continue
                values["found"][row] = json.dumps([[one.thing, one.colour] for one in found])
                if not checked:
                    continue
                for aspect in ASPECTS:
                    values[aspect][row] = getattr(verdict, aspect)
                values["right"][row], values["reasons"][row] = verdict.right, "; ".join(verdict.reasons)
            return Columns(values, errors)

        return measure
