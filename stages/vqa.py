"""A vision-language model asked whether a picture shows what its caption says: what a CLIP score cannot tell apart.

    stages:
      vqa: {model: my-vlm, after: [near]}          # vqa.score: probability of "yes"
    rules:
      vqa: {column: vqa.score, at_least: 0.5}

Off unless a recipe names it: one look costs as much as hundreds of CLIP scores. `model` is a folder in transformers'
format for image-text-to-text models (weights, configuration, processor), looked up like every other weight; nothing is
downloaded and no code from the folder is run. Rows are looked at one by one, so that padding cannot move a score.

Another engine takes part by giving an `Answerer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.decode import upright_rgb

if TYPE_CHECKING:
    from PIL import Image

QUESTION = 'Does this picture show "{caption}"? Answer yes or no.'
# Spellings whose first tokens stand for either answer.
YES = ("yes", "Yes", " yes", " Yes")
NO = ("no", "No", " no", " No")
LONGEST_CAPTION = 1000


class Answerer(Protocol):
    """Whoever answers a question about a picture."""

    def yes_probability(self, picture: Image.Image, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the first word of the answer. picture: upright RGB."""


@dataclass(frozen=True, kw_only=True)
class Vqa(Stage):
    """Probability that the model answers yes. question: with {caption} where the caption goes."""

    type: ClassVar[str] = "vqa"
    adds: ClassVar[tuple[Column, ...]] = (Column("score", "float32", scale="probability 0..1"),)
    resources: ClassVar[Resources] = Resources(cpus=1.0, gpus=1.0, memory_bytes=8 << 30)
    cpu_ms_per_row: ClassVar[float] = 5000.0
    path_options: ClassVar[tuple[str, ...]] = ("model",)
    model: str
    question: str = QUESTION
    precision: Literal["fp32", "bf16"] = "bf16"
    compute_batch: int = 16

    def __post_init__(self) -> None:
        if "{caption}" not in self.question:
            raise ValueError("vqa: question has no {caption} in it: every row would be asked the same")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "caption")

    def weights(self, context: Context) -> Mapping[str, Path]:
        """Every file of the model's folder that loading may read. Raises FileNotFoundError, ValueError."""
        folder = context.find(self.model)
        names = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
        files = {file.name: file for pattern in names for file in sorted(folder.glob(pattern))}
        if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
            raise ValueError(
                f"vqa: {folder} is no model that transformers has saved: it needs config.json and *.safetensors"
            )
        return files

    def open(self, context: Context) -> Measure:
        self.weights(context)
        return self.asking(TransformersAnswerer(context.find(self.model), context.device, self.precision))

    def asking(self, answerer: Answerer) -> Measure:
        """The measure with this answerer behind it."""

        def measure(batch: Batch) -> Columns:
            scores: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                picture, caption = batch.image(row), (batch["caption"][row] or "").strip()
                if picture is None or not caption:
                    errors[row] = "no caption" if picture is not None else batch.image_error(row) or "no picture"
                    continue
                # Not str.format: a caption with braces in it is no template.
                question = self.question.replace("{caption}", caption[:LONGEST_CAPTION])
                try:
                    score = answerer.yes_probability(upright_rgb(picture), question)
                except Exception as problem:  # one odd picture or caption must not take the batch with it
                    errors[row] = f"vqa: {type(problem).__name__}: {problem}"[:200]
                    continue
                if math.isfinite(score):
                    scores[row] = score
                else:
                    errors[row] = "score is not a finite number"
            return Columns({"score": scores}, errors)

        return measure


class TransformersAnswerer:
    """An image-text-to-text model of transformers, from a folder on this machine."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.torch = torch
        self.device = torch.device(device)
        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )
        self.model = model.to(self.device).eval()
        self.yes, self.no = self._first_tokens(YES), self._first_tokens(NO)
        if set(self.yes) & set(self.no):
            raise ValueError(f"vqa: the tokenizer in {folder} begins yes and no with the same token")

    def _first_tokens(self, spellings: Sequence[str]) -> list[int]:
        tokenizer = self.processor.tokenizer
        firsts = (tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in spellings)
        known = {first[0] for first in firsts if first and first[0] != tokenizer.unk_token_id}
        if not known:
            raise ValueError(f"vqa: the tokenizer knows none of {', '.join(map(repr, spellings))}")
        return sorted(known)

    def prompt(self, question: str) -> str:
        """The question in the model's own chat template, or after its image token where it has none."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return f"{getattr(self.processor, 'image_token', '<image>')}\n{question}\n"

    def yes_probability(self, picture: Image.Image, question: str) -> float:
        torch = self.torch
        inputs = self.processor(images=picture, text=self.prompt(question), return_tensors="pt").to(self.device)
        inputs = {
            name: value.to(self.model.dtype) if torch.is_floating_point(value) else value
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            logits_V = self.model(**inputs).logits[0, -1].float()
        yes, no = (torch.logsumexp(logits_V[tokens], dim=0) for tokens in (self.yes, self.no))
        return float(torch.sigmoid(yes - no))
