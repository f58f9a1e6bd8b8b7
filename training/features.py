"""Latents and text features that curation has computed (stages.latents, stages.text_embeddings), for training.

    features: {latents: latents, text: text}      # in a training recipe: names of the snapshot's stages

Features of a shard lie in one file of the snapshot, in the order of its rows, and are read whole. A cache is used
only if it holds exactly what training would compute: the same autoencoder, dtype and resolution, the same encoder and
lengths. Anything else is refused with the difference; a caption that has no features is, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.snapshot import Snapshot
from stages.contract import digest_of
from stages.latents import restored
from stages.text_embeddings import text_digest

SHARDS_HELD = 4


class StaleFeaturesError(ValueError):
    """Cached features that are not what training would compute; the message says what differs."""


class CachedFeatures:
    """The cached features of a snapshot's kept rows, by shard and uid. Either stage may be None."""

    def __init__(self, snapshot: Snapshot, latents: str | None, text: str | None) -> None:
        self.snapshot, self.latents_stage, self.text_stage = snapshot, latents, text
        self.stages = snapshot.manifest["recipe"]["stages"]
        for name, kind in ((latents, "latents"), (text, "text_embeddings")):
            if name is not None and self.stages.get(name, {}).get("type") != kind:
                having = [one for one, options in self.stages.items() if options["type"] == kind]
                raise StaleFeaturesError(
                    f"features: snapshot {snapshot.id} has no stage {name!r} of type {kind}; it has "
                    f"{', '.join(having) or 'none: add one to the recipe and curate again'}"
                )
        self._shards: OrderedDict[str, dict[str, dict[str, Any]]] = OrderedDict()

    def check(self, autoencoder: Any, resolution: int, text_encoder: Any) -> None:
        """Raise StaleFeaturesError unless the cache holds what these would compute."""
        if self.latents_stage:
            made = self.stages[self.latents_stage]
            self._same("resolution", made["resolution"], resolution)
            self._same("autoencoder", self._autoencoder_digest(made), autoencoder.digest)
        if self.text_stage:
            made = self.stages[self.text_stage]
            for name in ("max_tokens", "human_instruction"):
                self._same(name, made[name], getattr(text_encoder, name))
            self._same("dtype of the text encoder", made["dtype"], text_encoder.dtype_name)
            self._same("text encoder", self._model_digest(self.text_stage), text_encoder.weights_digest)

    def latents(self, path: str, uids: Sequence[str], shape: tuple[int, int, int]) -> Tensor:
        """(B, C, h, w) float32 of rows that lie in the shard `path`."""
        rows = self._rows(path)
        flat = [restored(self._value(rows, uid, f"{self.latents_stage}.latent")) for uid in uids]
        return torch.stack(flat).reshape(len(uids), *shape)

    def text(self, path: str, uid: str, caption: str, channels: int) -> Tensor:
        """(tokens, C) float32 of one caption of a row; StaleFeaturesError where the cache does not have it."""
        rows, stage = self._rows(path), self.text_stage
        digests = list(self._value(rows, uid, f"{stage}.digests"))
        if text_digest(caption) not in digests:
            raise StaleFeaturesError(
                f"features: stage {stage} has no features of the caption {caption[:60]!r} of {uid}: name its captioner "
                "under `of` and curate again, or leave features.text out"
            )
        place = digests.index(text_digest(caption))
        ends = np.cumsum(self._value(rows, uid, f"{stage}.lengths")) * channels
        start = int(ends[place - 1]) if place else 0
        return restored(self._value(rows, uid, f"{stage}.states")[start : int(ends[place])]).reshape(-1, channels)

    def _value(self, rows: dict[str, dict[str, Any]], uid: str, column: str) -> np.ndarray:
        value = rows.get(uid, {}).get(column)
        if value is None:
            raise StaleFeaturesError(
                f"features: {column} of {uid} is not there: the row was not measured; curate again"
            )
        return value

    def _rows(self, path: str) -> dict[str, dict[str, Any]]:
        """uid -> column -> values, of the features file of the same number as the shard."""
        import pyarrow.parquet as pq

        stem = PurePosixPath(path).stem
        if stem not in self._shards:
            names = [f"{self.latents_stage}.latent"] if self.latents_stage else []
            names += [f"{self.text_stage}.{name}" for name in ("states", "lengths", "digests") if self.text_stage]
            table = pq.read_table(self.snapshot.folder.open(f"features/{stem}.parquet"), columns=["uid", *names])
            uids = table["uid"].to_pylist()
            rows: dict[str, dict[str, Any]] = {}
            for name in names:
                for uid, value in zip(uids, table[name], strict=True):
                    if value.is_valid:  # a duplicate that was not measured has its keeper's uid
                        rows.setdefault(uid, {})[name] = value.values.to_numpy(zero_copy_only=False)
            self._shards[stem] = rows
            while len(self._shards) > SHARDS_HELD:
                self._shards.popitem(last=False)
        return self._shards[stem]

    def _model_digest(self, stage: str) -> str | None:
        return self.snapshot.manifest["models"].get(stage, {}).get("digest")

    def _autoencoder_digest(self, made: dict[str, Any]) -> str:
        if made["kind"] == "dc_ae":
            return digest_of("autoencoder", "dc_ae", self._model_digest(str(self.latents_stage)), made["dtype"])
        from stages.autoencoders import PixelShuffle

        return PixelShuffle(factor=made["factor"]).digest

    def _same(self, what: str, cached: Any, wanted: Any) -> None:
        if cached != wanted:
            raise StaleFeaturesError(
                f"features: the snapshot's cache was made with another {what} ({cached}, training has {wanted}): "
                "curate with it, or leave `features` out of the recipe"
            )
