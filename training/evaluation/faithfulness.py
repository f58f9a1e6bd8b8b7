"""Faithfulness by questions (after TIFA, Hu et al., 2023): does who looks at the picture answer as the prompt would?

    stage = Faithfulness(answerer="my-vlm")          # a folder of an image-text-to-text model that transformers saved

Questions come with the prompt. An answerer is anything that answers a question about a picture in a word: any VLM, or
for the made-up world the exact reader of pixels. A share of right answers says as much as the answerer can see: ask it
about true pictures first.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.decode import upright_rgb
from training.evaluation.composition import PixelReader, stands_as
from training.evaluation.suites import Prompt

if TYPE_CHECKING:
    from PIL import Image

LONGEST_ANSWER = 16  # tokens


class Answerer(Protocol):
    """Answers a question about a picture; choices are the answers that count."""

    def answer(self, picture: Image.Image, question: str, choices: Sequence[str]) -> str: ...


class VisionLanguageModel:
    """Any image-text-to-text model that transformers can load from a folder; greedy, safetensors only."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model, self.device = loaded.eval().to(device), device

    def answer(self, picture: Image.Image, question: str, choices: Sequence[str]) -> str:
        import torch

        asked = f"{question} Answer with one of: {', '.join(choices)}."
        content = [{"type": "image", "image": picture}, {"type": "text", "text": asked}]
        given = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        with torch.inference_mode():
            said = self.model.generate(**given, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        (text,) = self.processor.batch_decode(said[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(text)


class PixelAnswerer:
    """Answers the made-up suite's questions by reading pixels."""

    def answer(self, picture: Image.Image, question: str, choices: Sequence[str]) -> str:
        found = PixelReader().detect(picture)
        if match := re.fullmatch(r"How many (\w+)s are there\?", question):
            return str(sum(one.thing == match[1] for one in found))
        if match := re.fullmatch(r"What colour is the (\w+)\?", question):
            return next((one.colour for one in found if one.thing == match[1]), "none")
        if match := re.fullmatch(r"Is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", question):
            ones = [one for one in found if (one.colour, one.thing) == (match[1], match[2])]
            others = [one for one in found if (one.colour, one.thing) == (match[4], match[5])]
            return "yes" if any(stands_as(match[3], a, b) for a in ones for b in others if a != b) else "no"
        if match := re.fullmatch(r"Is there a (?:(\w+) )?(\w+)\?", question):
            return "yes" if any(one.thing == match[2] and match[1] in (None, one.colour) for one in found) else "no"
        return "unknown"


def agrees(said: str, answer: str, choices: Sequence[str]) -> bool:
    """Whether free text means `answer`: of the choices, the first that stands in it as a word is meant."""
    lowered = said.lower()
    places = {}
    for choice in choices:
        found = re.search(rf"\b{re.escape(choice.lower())}\b", lowered)
        if found:
            places[choice] = found.start()
    return bool(places) and min(places, key=lambda choice: places[choice]) == answer


def open_answerer(name: str, context: Context) -> Answerer:
    """ "made_up", a folder of a vision-language model, or "module:name" of a class of the user's own."""
    if name == "made_up":
        return PixelAnswerer()
    module, colon, attribute = name.partition(":")
    if colon and "/" not in name:
        return getattr(importlib.import_module(module), attribute)()
    return VisionLanguageModel(context.find(name), context.device)


@dataclass(frozen=True, kw_only=True)
class Faithfulness(Stage):
    """The share of a prompt's questions that are answered as the prompt would; None where it has none."""

    type: ClassVar[str] = "faithfulness"
    adds: ClassVar[tuple[Column, ...]] = (Column("share", "float32", scale="0..1"), Column("wrong", "string"))
    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=4 << 30)
    path_options: ClassVar[tuple[str, ...]] = ("answerer",)
    answerer: str = "made_up"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "prompt")

    def weights(self, context: Context) -> Mapping[str, Path]:
        if self.answerer == "made_up" or ":" in self.answerer:
            return {}
        return {path.name: path for path in sorted(context.find(self.answerer).glob("*.safetensors"))}

    def open(self, context: Context) -> Measure:
        answerer = open_answerer(self.answerer, context)

        def measure(batch: Batch) -> Columns:
            shares: list[Any] = [None] * len(batch)
            wrong: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                questions, picture = Prompt.from_json(batch["prompt"][row]).questions, batch.image(row)
                if not questions:
                    continue
                try:
                    if picture is None:
                        raise ValueError(batch.image_error(row) or "no picture")
                    shown = upright_rgb(picture)
                    said = [answerer.answer(shown, one.text, one.choices) for one in questions]
                except Exception as problem:  # one odd drawing costs that drawing
                    errors[row] = f"{type(problem).__name__}: {problem}"[:200]
                    continue
                right = [agrees(text, one.answer, one.choices) for text, one in zip(said, questions, strict=True)]
                shares[row] = sum(right) / len(right)
                wrong[row] = "; ".join(one.text for one, fine in zip(questions, right, strict=True) if not fine)
            return Columns({"share": shares, "wrong": wrong}, errors)

        return measure
