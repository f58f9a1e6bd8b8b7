"""Text features of captions, computed once for every training run that uses the same encoder.

    stages:
      text: {type: text_embeddings, folder: gemma-2-2b-it, max_tokens: 300, human_instruction: true, dtype: bfloat16,
             of: [long], after: [near]}

For every row: its caption, the alternatives that came with it and whatever the captioners in `of` wrote with success,
each known by the digest of its text. Only tokens are kept: padding is not stored, and is zeros when it is read again,
which the attention mask takes out. Values are float32, or the bits of bfloat16 where that is the encoder's dtype. The
encoder's digest stands in the manifest, and training refuses a cache of another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from stages.captioners import SUCCESS
from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.latents import stored
from stages.text_encoders import model_files, open_text_encoder


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings(Stage):
    """Last hidden states (tokens x channels, caption after caption) of a row's captions.

    digests: of the texts (`text_digest`), lengths: tokens of each. of: captioners whose captions are taken too.
    compute_batch: rows; the encoder cuts their captions into passes of its own. text_batch: captions in such a pass.
    """

    type: ClassVar[str] = "text_embeddings"
    resources: ClassVar[Resources] = Resources(cpus=1.0, gpus=1.0, memory_bytes=8 << 30)
    cpu_ms_per_row: ClassVar[float] = 500.0
    path_options: ClassVar[tuple[str, ...]] = ("folder",)
    folder: str
    max_tokens: int = 300
    human_instruction: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    of: tuple[str, ...] = ()
    text_batch: int = 64
    compute_batch: int = 64

    @property
    def needs(self) -> tuple[str, ...]:
        return (
            "caption",
            "alternatives",
            *(f"{name}.{column}" for name in self.of for column in ("texts", "statuses")),
        )

    @property
    def adds(self) -> tuple[Column, ...]:  # type: ignore[override]
        return (
            Column("states", "float32[]" if self.dtype == "float32" else "uint16[]", feature=True),
            Column("lengths", "int32[]", unit="tokens", feature=True),
            Column("digests", "string[]", feature=True),
            Column("captions", "int32", unit="captions"),
        )

    def encoder_options(self) -> dict[str, Any]:
        """The options that open_text_encoder takes."""
        names = ("folder", "max_tokens", "human_instruction", "dtype")
        return {**{name: getattr(self, name) for name in names}, "batch": self.text_batch}

    def weights(self, context: Context) -> Mapping[str, Path]:
        return model_files(context.find(self.folder))

    def open(self, context: Context) -> Measure:
        encoder = open_text_encoder(self.encoder_options(), models=context.models, device=context.device)

        def measure(batch: Batch) -> Columns:
            texts = [self._texts(batch, row) for row in range(len(batch))]
            distinct = sorted({text for mine in texts for text in mine})
            features_TLC, mask_TL = encoder.encode(distinct)
            triples = zip(distinct, features_TLC, mask_TL, strict=True)
            kept = {text: features_LC[mask_L.bool()] for text, features_LC, mask_L in triples}
            values: dict[str, list[Any]] = {column.name: [] for column in self.adds}
            for mine in texts:
                values["states"].append([number for text in mine for number in stored(kept[text], self.dtype)])
                values["lengths"].append([len(kept[text]) for text in mine])
                values["digests"].append([text_digest(text) for text in mine])
                values["captions"].append(len(mine))
            return Columns(values)

        return measure

    def _texts(self, batch: Batch, row: int) -> list[str]:
        """The captions of a row, each once, in order."""
        texts = [batch["caption"][row], *(batch["alternatives"][row] or ())]
        for name in self.of:
            said, statuses = batch[f"{name}.texts"][row] or (), batch[f"{name}.statuses"][row] or ()
            texts += [text for text, status in zip(said, statuses, strict=True) if status == SUCCESS]
        return list(dict.fromkeys(text for text in texts if (text or "").strip()))


def text_digest(text: str) -> str:
    """32 hex digits that name a caption's text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
