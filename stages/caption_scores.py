"""CLIP scores of more texts than the caption, over image embeddings that are already measured: no picture is looked at.

    stages:
      clip:   {type: clip_score, model: ViT-L-14, pretrained: openai}
      others: {type: caption_scores, model: ViT-L-14, pretrained: openai}    # others.scores, .text_tokens
      probe:  {type: caption_probe, model: ViT-L-14, pretrained: openai}     # probe.caption, .swapped, ...

`caption_scores` scores every alternative caption of a row, in their order. `caption_probe` asks what the model can
tell apart: it scores the caption, another row's caption, the caption with two of its attributes exchanged ("a red ball
on a blue box" to "a blue ball on a red box") and with its relation reversed ("left of" to "right of"). A CLIP that
ranks whole captions well may be near chance on the last two; reports show its AUC on each side by side.

Both take `model` and `pretrained` as `clip_score` does, and must name the model that made `embedding`. Embeddings are
kept in fp16, so that a score differs from `clip_score`'s own by up to about 0.0005.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from stages.clip_score import ClipScore
from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage

# Words of one kind can be exchanged for each other within a caption.
ATTRIBUTES: tuple[frozenset[str], ...] = (
    frozenset("red blue green yellow orange purple pink brown black white grey gray golden silver beige teal".split()),  # noqa: SIM905
    frozenset("small large big little tiny huge tall short long".split()),  # noqa: SIM905
    frozenset("young old new ancient".split()),  # noqa: SIM905
    frozenset("wooden metal plastic stone glass leather paper".split()),  # noqa: SIM905
)
_OPPOSITES = (
    ("to the left of", "to the right of"),
    ("left of", "right of"),
    ("on the left", "on the right"),
    ("above", "below"),
    ("on top of", "underneath"),
    ("over", "under"),
    ("in front of", "behind"),
    ("inside", "outside"),
)
RELATIONS: Mapping[str, str] = {one: other for a, b in _OPPOSITES for one, other in ((a, b), (b, a))}
_RELATION = re.compile(r"\b(" + "|".join(sorted(map(re.escape, RELATIONS), key=len, reverse=True)) + r")\b", re.I)
_WORD = re.compile(r"[^\W\d_]+")


def with_attributes_exchanged(caption: str) -> str | None:
    """The caption with the first two different attributes of one kind in each other's place, or None."""
    words = list(_WORD.finditer(caption))
    for kind in ATTRIBUTES:
        found = [word for word in words if word[0].lower() in kind]
        other = next((word for word in found if word[0].lower() != found[0][0].lower()), None)
        if other is not None:
            first = found[0]
            return (
                caption[: first.start()]
                + other[0]
                + caption[first.end() : other.start()]
                + first[0]
                + caption[other.end() :]
            )
    return None


def with_relation_reversed(caption: str) -> str | None:
    """The caption with its first relation turned round, or None."""
    found = _RELATION.search(caption)
    if found is None:
        return None
    return caption[: found.start()] + RELATIONS[found[0].lower()] + caption[found.end() :]


@dataclass(frozen=True, kw_only=True)
class TextTowerStage(Stage):
    """Base of stages that hold texts against stored image embeddings. Options are `clip_score`'s."""

    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=2 << 30)
    cpu_ms_per_row: ClassVar[float] = 20.0
    path_options: ClassVar[tuple[str, ...]] = ("model", "pretrained")
    model: str = "ViT-L-14"
    pretrained: str = ""
    precision: Literal["fp32", "bf16"] = "fp32"
    embedding: str = "clip.image_embedding"
    compute_batch: int = 64

    def __post_init__(self) -> None:
        self._clip()

    def _clip(self) -> ClipScore:
        return ClipScore(
            model=self.model,
            pretrained=self.pretrained,
            precision=self.precision,
            compute_batch=self.compute_batch,
        )

    def weights(self, context: Context) -> Mapping[str, Path]:
        return self._clip().weights(context)

    def open_scores(self, context: Context) -> Callable[[Sequence[tuple[Any, str]]], tuple[list[float], list[int]]]:
        """From (image embedding, text) pairs to cosines and token counts; forward passes are all of one shape."""
        tower: Any = self._clip().open(context)
        torch, size = tower.torch, self.compute_batch

        def one_pass(pairs: Sequence[tuple[Any, str]]) -> tuple[list[float], list[int]]:
            tokens = tower.tokenizer([text for _, text in pairs])
            padded = torch.zeros((size, tokens.shape[1]), dtype=tokens.dtype)
            padded[: len(pairs)] = tokens
            with torch.inference_mode():
                text_BD = tower.model.encode_text(padded.to(tower.device)).float()
                text_BD = torch.nn.functional.normalize(text_BD, dim=-1)[: len(pairs)].cpu().numpy()
            image_BD = np.stack([np.asarray(embedding, np.float32) for embedding, _ in pairs])
            if image_BD.shape != text_BD.shape:
                raise ValueError(
                    f"{self.type}: {self.embedding} has {image_BD.shape[1]} numbers, {self.model} makes "
                    f"{text_BD.shape[1]}; name the model that made it"
                )
            image_BD /= np.maximum(np.linalg.norm(image_BD, axis=1, keepdims=True), 1e-12)
            return (image_BD * text_BD).sum(axis=1).tolist(), [int(tower._token_count(row)) for row in tokens]

        def scores(pairs: Sequence[tuple[Any, str]]) -> tuple[list[float], list[int]]:
            threads = torch.get_num_threads()
            if tower.device.type == "cpu":
                torch.set_num_threads(tower.threads)
            try:
                found: tuple[list[float], list[int]] = ([], [])
                for first in range(0, len(pairs), size):
                    cosines, counts = one_pass(pairs[first : first + size])
                    found[0].extend(cosines)
                    found[1].extend(counts)
                return found
            finally:
                torch.set_num_threads(threads)

        return scores


@dataclass(frozen=True, kw_only=True)
class CaptionScores(TextTowerStage):
    """The cosine of every alternative caption, in the order of `alternatives`, and how many tokens each has."""

    type: ClassVar[str] = "caption_scores"
    adds: ClassVar[tuple[Column, ...]] = (
        Column("scores", "float[]", scale="cosine -1..1"),
        Column("text_tokens", "int32[]", unit="tokens"),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.embedding, "alternatives")

    def open(self, context: Context) -> Measure:
        score = self.open_scores(context)

        def measure(batch: Batch) -> Columns:
            errors = [None if embedding is not None else f"no {self.embedding}" for embedding in batch[self.embedding]]
            texts = [
                list(more or []) if error is None else []
                for more, error in zip(batch["alternatives"], errors, strict=True)
            ]
            pairs = [(batch[self.embedding][row], text) for row, more in enumerate(texts) for text in more]
            cosines, counts = score(pairs)
            scores: list[Any] = [None] * len(batch)
            tokens: list[Any] = [None] * len(batch)
            first = 0
            for row, more in enumerate(texts):
                if errors[row] is None:
                    scores[row], tokens[row] = cosines[first : first + len(more)], counts[first : first + len(more)]
                first += len(more)
            return Columns({"scores": scores, "text_tokens": tokens}, errors)

        return measure


@dataclass(frozen=True, kw_only=True)
class CaptionProbe(TextTowerStage):
    """Cosines of a caption and of three kinds of wrong ones; null where a caption has nothing to exchange.

    fraction: the share of rows that is probed, chosen by a hash of their uid; the others carry nulls.
    """

    type: ClassVar[str] = "caption_probe"
    adds: ClassVar[tuple[Column, ...]] = (
        Column("caption", "float32", scale="cosine -1..1"),
        Column("swapped", "float32", scale="cosine -1..1"),
        Column("attributes", "float32", scale="cosine -1..1"),
        Column("relation", "float32", scale="cosine -1..1"),
    )
    fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"caption_probe: fraction {self.fraction} is not in (0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.embedding, "caption", "uid")

    def open(self, context: Context) -> Measure:
        score = self.open_scores(context)

        def measure(batch: Batch) -> Columns:
            captions = [(text or "").strip() for text in batch["caption"]]
            asked: list[tuple[int, str, str]] = []
            for row, caption in enumerate(captions):
                if batch[self.embedding][row] is None or not caption or not self._probed(batch["uid"][row]):
                    continue
                asked.append((row, "caption", caption))
                others = captions[row + 1 :] + captions[:row]
                wrong = {
                    "swapped": next((other for other in others if other and other != caption), None),
                    "attributes": with_attributes_exchanged(caption),
                    "relation": with_relation_reversed(caption),
                }
                asked += [(row, name, text) for name, text in wrong.items() if text is not None]
            cosines, _ = score([(batch[self.embedding][row], text) for row, _, text in asked])
            values: dict[str, list[Any]] = {column.name: [None] * len(batch) for column in self.adds}
            for (row, name, _), cosine in zip(asked, cosines, strict=True):
                values[name][row] = cosine
            return Columns(values)

        return measure

    def _probed(self, uid: str) -> bool:
        draw = int(hashlib.sha256(f"probe {uid}".encode()).hexdigest()[:13], 16)
        return draw < self.fraction * 16**13
