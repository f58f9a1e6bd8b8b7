"""CLIP scores of the captions that a captioner wrote, however long they are.

    stages:
      clip:   {type: clip_score, model: ViT-L-14, pretrained: openai}
      short:  {type: recaption, model: small-vlm}
      scores: {type: synthetic_score, of: short, clip: clip, model: ViT-L-14, pretrained: openai}

Model and weights must be those of the stage `clip`, whose picture embeddings are read: no picture is decoded again, and
only the text tower runs. It reads so many tokens (77 in OpenAI's models) and cuts the rest away, so that the end of a
long caption would never be judged. A longer one is therefore cut into chunks that fit, at ends of sentences where it
can be and between words where not; its score is the mean of the chunks' cosines, each weighted by its words. A caption
that fits has the score that clip_score would give it, but for the embedding's half precision (about 0.0005).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from stages.captioners import SUCCESS, TRUNCATED
from stages.clip_score import ClipScore
from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage

_SENTENCES = re.compile(r"(?<=[.!?。！？;])\s+")


@dataclass(frozen=True, kw_only=True)
class SyntheticScore(Stage):
    """Cosine of picture and caption for every caption of the captioner `of` that has a text, and its text tokens.

    tokens counts start and end marks of every chunk. compute_batch: chunks in one pass of the text tower.
    """

    type: ClassVar[str] = "synthetic_score"
    adds: ClassVar[tuple[Column, ...]] = (
        Column("scores", "float32[]", scale="cosine -1..1", captions=True),
        Column("tokens", "int32[]", unit="tokens", captions=True),
        Column("best", "float32", scale="cosine -1..1"),
    )
    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=2 << 30)
    cpu_ms_per_row: ClassVar[float] = 40.0
    path_options: ClassVar[tuple[str, ...]] = ("model", "pretrained")
    of: str
    clip: str = "clip"
    model: str = "ViT-L-14"
    pretrained: str = ""
    precision: Literal["fp32", "bf16"] = "fp32"
    compute_batch: int = 64

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"{self.clip}.image_embedding", f"{self.of}.texts", f"{self.of}.statuses")

    def _clip(self) -> ClipScore:
        return ClipScore(
            model=self.model, pretrained=self.pretrained, precision=self.precision, compute_batch=self.compute_batch
        )

    def weights(self, context: Context) -> Mapping[str, Path]:
        return self._clip().weights(context)

    def open(self, context: Context) -> Measure:
        scorer: Any = self._clip().open(context)

        def measure(batch: Batch) -> Columns:
            rows, most = range(len(batch)), scorer.context_tokens
            scores: list[Any] = [None] * len(batch)
            tokens: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            chunks: list[tuple[int, int, str]] = []
            for row in rows:
                texts, statuses = (batch[name][row] for name in self.needs[1:])
                if batch[self.needs[0]][row] is None or texts is None:
                    errors[row] = f"no {self.needs[0 if texts is not None else 1]}"
                    continue
                scores[row], tokens[row] = [None] * len(texts), [None] * len(texts)
                for place, (text, status) in enumerate(zip(texts, statuses, strict=True)):
                    if status in (SUCCESS, TRUNCATED) and text.strip():
                        chunks += [(row, place, part) for part in chunks_of(text, scorer.count_tokens, most)]
            text_KD = scorer.embed_texts([text for _, _, text in chunks])
            sums: dict[tuple[int, int], list[float]] = {}
            for (row, place, text), text_D in zip(chunks, text_KD, strict=True):
                image_D = np.asarray(batch[self.needs[0]][row], np.float32)
                if image_D.shape != text_D.shape:
                    raise ValueError(
                        f"synthetic_score: {self.needs[0]} has {image_D.size} numbers and {self.model} gives "
                        f"{text_D.size}: name the model and weights of the stage {self.clip}"
                    )
                cosine = float(image_D @ text_D / max(float(np.linalg.norm(image_D)), 1e-12))
                words = float(len(text.split()))
                total = sums.setdefault((row, place), [0.0, 0.0, 0.0])
                for index, part in enumerate((cosine * words, words, scorer.count_tokens(text))):
                    total[index] += part
            for (row, place), (weighted, weight, count) in sums.items():
                scores[row][place], tokens[row][place] = weighted / weight, int(count)
            best = [max((one for one in mine or () if one is not None), default=None) for mine in scores]
            return Columns({"scores": scores, "tokens": tokens, "best": best}, errors)

        return measure


def chunks_of(text: str, count: Callable[[str], int], limit: int) -> list[str]:
    """The text in pieces of at most `limit` tokens (as `count` counts them, marks included), nothing lost but spaces.

    Whole sentences go together while they fit; a sentence that does not fit alone is cut between words, and a word that
    does not is left for the tower to cut.
    """
    pieces: list[str] = []
    for sentence in _SENTENCES.split(text.strip()):
        pieces += [sentence] if count(sentence) <= limit else _packed(sentence.split(), count, limit)
    return _packed(pieces, count, limit)


def _packed(parts: Sequence[str], count: Callable[[str], int], limit: int) -> list[str]:
    """Parts joined with spaces, greedily, while they fit."""
    packed: list[str] = []
    for part in parts:
        joined = f"{packed[-1]} {part}" if packed else part
        if packed and count(joined) <= limit:
            packed[-1] = joined
        else:
            packed.append(part)
    return packed
