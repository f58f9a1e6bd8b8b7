"""From a snapshot's shards to training batches.

    snapshot.ledger ─ kept rows of one split ─┐
    snapshot.shards ─ members by output_key ──┴─> Samples ──> image, resized and cropped ──> latent ─┐
                                                     └─────────────────────────> caption ──> text ───┴─> TrainingBatch

Which samples a step sees is a function of (seed, global sample index) alone: `Order` permutes windows of shards and
then the samples of each window, so that a worker at any scale touches few shards at a time, and global batch i is the
same set in the same order whatever the number of workers; ranks take slices of it. The sampler's whole state is one
number.

Which of a sample's captions is learnt from is the affair of training.captions; without options it is the original one,
which lies in the shard beside the picture. Validation always has the originals.

Latents and text features are computed once and kept in memory where the whole snapshot fits in `cache_bytes`;
otherwise each micro-batch is read, decoded and encoded as it comes. Both ways the encoders see batches that are fixed
by the data, never by what happens to be missing from a cache: floating-point results differ by batch, and a resumed
run must repeat the interrupted one to the last bit.

Training sees rows of the split "train" only. Asking for another is refused, and so is a shard whose member says
held_out where the ledger says train. Tar members are looked up by name and by an allow-list of extensions; nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from pipelines.snapshot import Snapshot
from stages.pixels import pixels_of
from training.captions import Caption, CaptionSampler, usable_captions
from training.features import CachedFeatures
from training.objectives import TrainingBatch

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
KNOWN_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")
WINDOW_SHARDS = 64  # shards shuffled together: a window of LAION-sized shards holds some 600,000 samples
OPEN_SHARDS = 8  # tar indexes kept a reader
ENCODE_IMAGES = 64  # images an autoencoder sees at once when a whole snapshot is encoded; part of the numbers
ENCODE_CAPTIONS = 64


class DataError(ValueError):
    """A snapshot that cannot be trained on; the message says which file and what to do."""


class Autoencoder(Protocol):
    """What is needed of `stages.autoencoders`: pixels (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w)."""

    def encode(self, pixels: Tensor, /) -> Tensor: ...


class TextEncoder(Protocol):
    """What this module needs of `stages.text_encoders`: captions to (features (B, L, C), mask (B, L))."""

    def encode(self, captions: list[str], /) -> tuple[Tensor, Tensor]: ...


# --- the snapshot ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A kept occurrence: who it is and where its bytes lie."""

    uid: str
    image_id: str
    shard: int
    key: str


@dataclass(frozen=True)
class Sample:
    row: Row
    image: bytes
    caption: str


class SnapshotSamples:
    """The kept samples of a snapshot: counts from the manifest, rows from the ledger, bytes from the shards."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.folder, self.manifest, self.id = snapshot.folder, snapshot.manifest, snapshot.id
        self.shards: list[dict[str, Any]] = list(self.manifest["shards"])
        self._rows: OrderedDict[tuple[int, str], list[Row]] = OrderedDict()
        self._captions: OrderedDict[int, dict[str, list[Caption]]] = OrderedDict()
        self._members: OrderedDict[int, dict[str, dict[str, tuple[int, int]]]] = OrderedDict()

    def count(self, shard: int, split: str) -> int:
        entry = self.shards[shard]
        held_out = int(entry.get("held_out", 0))
        return held_out if split == "held_out" else int(entry["count"]) - held_out

    def counts(self, split: str) -> list[int]:
        """Kept rows of `split` in each shard, from the manifest alone."""
        return [self.count(shard, split) for shard in range(len(self.shards))]

    def rows(self, shard: int, split: str) -> list[Row]:
        """The kept rows of one split that lie in one shard, in the order of their keys."""
        if (shard, split) not in self._rows:
            self._rows[shard, split] = self._read_rows(shard, split)
            while len(self._rows) > 4 * WINDOW_SHARDS:
                self._rows.popitem(last=False)
        return self._rows[shard, split]

    def _read_rows(self, shard: int, split: str) -> list[Row]:
        import pyarrow.dataset as ds

        path = str(self.shards[shard]["path"])
        stem = PurePosixPath(path).stem
        expected = self.count(shard, split)
        names = [name for name in self.manifest["files"] if name.startswith("ledger/")]
        wanted = (ds.field("verdict") == "kept") & (ds.field("split") == split)
        found: list[Row] = []
        # The ledger file of the same number holds a shard's rows; anything else means looking through all of them.
        for candidates in ([self.shards[shard].get("ledger", f"ledger/{stem}.parquet")], names):
            if not set(candidates) <= set(names):
                continue
            table = ds.dataset(
                [self.folder.at(name) for name in candidates], filesystem=self.folder.filesystem, format="parquet"
            ).to_table(columns=["uid", "image_id", "output_shard", "output_key"], filter=wanted)
            found = [
                Row(uid, image_id, shard, key)
                for uid, image_id, where, key in zip(*(column.to_pylist() for column in table.columns), strict=True)
                if PurePosixPath(str(where)).stem == stem
            ]
            if len(found) == expected:
                return sorted(found, key=lambda row: row.key)
        raise DataError(
            f"{self.folder.address(path)}: the manifest counts {expected} {split} rows in this shard and the ledger "
            f"holds {len(found)}: the snapshot is damaged; run `sluice curate` again to repair it"
        )

    def read(self, row: Row, split: str) -> Sample:
        """One sample's image bytes and caption, checked against the ledger.

        Raises DataError where a member is missing, belongs to another split, or is not the image that the ledger names.
        """
        path = str(self.shards[row.shard]["path"])
        members = self._index(row.shard).get(row.key)
        where = f"{self.folder.address(path)}: sample {row.key}"
        if members is None:
            raise DataError(f"{where} is in the ledger but not in the shard: run `sluice curate` again to repair it")
        extension = next((known for known in IMAGE_EXTENSIONS if known in members), None)
        if extension is None or "txt" not in members:
            raise DataError(f"{where} has members {sorted(members)}, expected an image and a .txt: curate again")
        with self.folder.open(path) as stream:
            image, caption = (_read_at(stream, *members[name]) for name in (extension, "txt"))
            facts = json.loads(_read_at(stream, *members["json"])) if "json" in members else {}
        if facts.get("split", split) != split:
            raise DataError(
                f"{where} says it is {facts['split']} while the ledger says {split}: refusing to train on it; the "
                "snapshot was put together from two runs, curate again"
            )
        if hashlib.sha256(image).hexdigest()[:32] != row.image_id:
            raise DataError(f"{where} is not the image that the ledger names ({row.image_id}): the shard was changed")
        return Sample(row, image, caption.decode("utf-8"))

    def captions(self, sample: Sample) -> list[Caption]:
        """Every caption that the snapshot has for a sample; the one beside the picture where the table has none."""
        shard = sample.row.shard
        if shard not in self._captions:
            self._captions[shard] = self._read_captions(shard)
            while len(self._captions) > 4 * WINDOW_SHARDS:
                self._captions.popitem(last=False)
        return self._captions[shard].get(sample.row.uid) or [Caption(sample.caption)]

    def _read_captions(self, shard: int) -> dict[str, list[Caption]]:
        """uid -> captions. The table of the same number holds a shard's captions; else every table is searched."""
        import pyarrow.dataset as ds

        names = [name for name in self.manifest["files"] if name.startswith("captions/")]
        stem = PurePosixPath(str(self.shards[shard]["path"])).stem
        chosen = [f"captions/{stem}.parquet"] if f"captions/{stem}.parquet" in names else names
        if not chosen:
            return {}
        uids = [row.uid for split in ("train", "held_out") for row in self.rows(shard, split)]
        columns = ["uid", "caption_id", "source", "text", "clip_score", "status"]
        table = ds.dataset(
            [self.folder.at(name) for name in chosen], filesystem=self.folder.filesystem, format="parquet"
        ).to_table(columns=columns, filter=ds.field("uid").isin(uids))
        by_uid: dict[str, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            by_uid.setdefault(row["uid"], []).append(row)
        return {uid: usable_captions(rows) for uid, rows in by_uid.items()}

    def _index(self, shard: int) -> dict[str, dict[str, tuple[int, int]]]:
        """key -> extension -> (offset, size) for one shard, read from the tar's headers."""
        if shard not in self._members:
            index: dict[str, dict[str, tuple[int, int]]] = {}
            with (
                self.folder.open(str(self.shards[shard]["path"])) as stream,
                tarfile.open(fileobj=stream, mode="r:") as tar,
            ):
                for member in tar:
                    key, _, extension = member.name.rpartition(".")
                    if member.isfile() and extension.lower() in KNOWN_EXTENSIONS:
                        index.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
            self._members[shard] = index
            while len(self._members) > OPEN_SHARDS:
                self._members.popitem(last=False)
        return self._members[shard]


def _read_at(stream: Any, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


# --- order -----------------------------------------------------------------------------------------------------------


class Order:
    """The endless sequence of samples: global index -> (epoch, shard, place in the shard's rows of this split).

    Shards are permuted, cut into windows of `window`, and the samples of each window permuted, all from (seed,
    epoch). The memory it takes grows with the number of shards, not of samples.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int = WINDOW_SHARDS) -> None:
        self.counts, self.seed, self.window = np.asarray(counts, dtype=np.int64), seed, window
        self.samples = int(self.counts.sum())
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def at(self, index: int) -> tuple[int, int, int]:
        epoch, place = divmod(index, self.samples)
        ends, _ = self._epoch(epoch)
        number = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[number - 1]) if number else 0
        shard, row = self._window(epoch, number)[place - start]
        return epoch, int(shard), int(row)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(where each window ends, the permuted shards) of one epoch."""
        if epoch not in self._epochs:
            shards = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.counts))
            per_window = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.window))
            self._epochs[epoch] = np.cumsum(per_window), shards
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """(samples, 2): shard and row of every sample of a window, in the order of training."""
        if (epoch, number) not in self._windows:
            shards = self._epoch(epoch)[1][number * self.window : (number + 1) * self.window]
            pairs = np.concatenate(
                [np.stack([np.full(self.counts[s], s), np.arange(self.counts[s])], axis=1) for s in shards]
            )
            self._windows[epoch, number] = np.random.default_rng([self.seed, epoch, 1 + number]).permutation(pairs)
            while len(self._windows) > 2:
                self._windows.popitem(last=False)
        return self._windows[epoch, number]


@dataclass(frozen=True)
class Slice:
    """What a rank runs at once of one global batch: places in the batch, and global sample indexes."""

    positions: range
    indexes: range


def slices_of_step(step: int, global_batch: int, micro_batch: int, rank: int, workers: int) -> list[Slice]:
    """What `rank` runs, in order, for optimizer step `step`. Ranks take contiguous slices of the global batch."""
    share = global_batch // workers
    first = step * global_batch
    return [
        Slice(range(start, start + micro_batch), range(first + start, first + start + micro_batch))
        for start in range(rank * share, (rank + 1) * share, micro_batch)
    ]


# --- batches ---------------------------------------------------------------------------------------------------------

Share = Callable[[Tensor], Tensor]  # sums a tensor over all ranks, in place; the identity for one


@dataclass(frozen=True)
class Encoders:
    """What turns samples into what networks eat, and the device that it is done on."""

    autoencoder: Autoencoder
    text_encoder: TextEncoder
    resolution: int
    device: str = "cpu"
    cached: CachedFeatures | None = None

    @torch.no_grad()
    def latents(self, images: Sequence[bytes]) -> Tensor:
        """(B, C, h, w) float32 on the CPU."""
        pixels = torch.stack([pixels_of(image, self.resolution) for image in images])
        return self.autoencoder.encode(pixels.to(self.device)).float().cpu()

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, C) and mask (B, L), float32, on the CPU."""
        features, mask = self.text_encoder.encode(list(captions))
        return features.float().cpu(), mask.float().cpu()

    def latents_of(self, source: SnapshotSamples, samples: Sequence[Sample]) -> Tensor:
        """(B, C, h, w) of samples: read where the snapshot has them, else computed."""
        if self.cached is None or self.cached.latents_stage is None:
            return self.latents([sample.image for sample in samples])
        shape = cast(Any, self.autoencoder).latent_shape(self.resolution, self.resolution)
        return torch.cat(
            [
                self.cached.latents(str(source.shards[sample.row.shard]["path"]), [sample.row.uid], shape)
                for sample in samples
            ]
        )

    def text_of(self, source: SnapshotSamples, rows: Sequence[Row], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, C) and mask (B, L) of rows' captions: read where the snapshot has them, else computed."""
        if self.cached is None or self.cached.text_stage is None:
            return self.text(captions)
        encoder = cast(Any, self.text_encoder)
        text = torch.zeros(len(rows), encoder.max_tokens, encoder.channels)
        mask = torch.zeros(len(rows), encoder.max_tokens)
        for place, (row, caption) in enumerate(zip(rows, captions, strict=True)):
            path = str(source.shards[row.shard]["path"])
            states = self.cached.text(path, row.uid, caption, encoder.channels)
            text[place, : len(states)], mask[place, : len(states)] = states, 1
        return text, mask


class Batches:
    """Training or validation batches of one split of a snapshot, for one rank.

    `micro_batch(slice)` is a TrainingBatch, `uids(slice)` who is in it. Raises DataError for a split without rows.
    """

    def __init__(
        self,
        samples: SnapshotSamples,
        split: str,
        encoders: Encoders,
        *,
        seed: int,
        sampler: CaptionSampler | None = None,
        shuffled: bool = True,
        limit: int | None = None,
        cache_bytes: int = 0,
        rank: int = 0,
        workers: int = 1,
        share: Share = lambda tensor: tensor,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.source, self.split, self.encoders, self.sampler = samples, split, encoders, sampler
        self.rank, self.workers, self.share, self.say = rank, workers, share, say
        counts = samples.counts(split)
        if not sum(counts):
            raise DataError(
                f"{samples.folder.url}: the snapshot keeps no row of the split {split}: nothing to learn from"
            )
        self.order = Order(counts, seed) if shuffled else None
        self._ends = np.cumsum(counts)
        self.samples = int(self._ends[-1]) if limit is None else min(limit, int(self._ends[-1]))
        self.null_text, self.null_mask = (tensor[0] for tensor in encoders.text([""]))
        self._cache = self._fill(cache_bytes)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if self._cache is None else None
        self._ahead: dict[Slice, Future[TrainingBatch]] = {}

    # -- who

    def row(self, index: int) -> Row:
        """The row at a global sample index (shuffled), or at a place in the split's own order."""
        if self.order is not None:
            _, shard, place = self.order.at(index)
            return self.source.rows(shard, self.split)[place]
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.source.rows(shard, self.split)[index - (int(self._ends[shard - 1]) if shard else 0)]

    def uids(self, part: Slice) -> list[str]:
        return [self.row(index).uid for index in part.indexes]

    def epoch(self, index: int) -> float:
        return index / self.samples

    # -- what

    def micro_batch(self, part: Slice, following: Slice | None = None) -> TrainingBatch:
        """The batch of `part`. Without a cache, `following` is read and encoded meanwhile."""
        if self._cache is not None:
            return self._from_cache(part)
        assert self._pool is not None
        ready = self._ahead.pop(part, None) or self._pool.submit(self._from_shards, part)
        if following is not None and following not in self._ahead:
            self._ahead[following] = self._pool.submit(self._from_shards, following)
        return ready.result()

    def _batch(self, latents: Tensor, text: Tensor, mask: Tensor, part: Slice) -> TrainingBatch:
        return TrainingBatch(
            latents_BCHW=latents,
            text_BLC=text,
            mask_BL=mask,
            position_B=torch.tensor(part.positions, dtype=torch.int64),
            null_text_LC=self.null_text[: text.shape[1]],
            null_mask_L=self.null_mask[: text.shape[1]],
        )

    def _choices(self, sample: Sample) -> list[Caption]:
        """The captions that one is chosen from: the original alone unless a sampler is there to choose."""
        return self.source.captions(sample) if self.sampler else [Caption(sample.caption)]

    def _chosen(self, captions: Sequence[Caption], index: int, uid: str) -> str:
        """The caption that the sample at a global index is learnt with."""
        if self.sampler is None:
            return captions[0].text
        return self.sampler.choose(captions, uid, index // self.samples).text

    def _from_shards(self, part: Slice) -> TrainingBatch:
        samples = [self.source.read(self.row(index), self.split) for index in part.indexes]
        latents = self.encoders.latents_of(self.source, samples)
        captions = [
            self._chosen(self._choices(sample), index, sample.row.uid)
            for index, sample in zip(part.indexes, samples, strict=True)
        ]
        rows = [sample.row for sample in samples]
        return self._batch(latents, *self.encoders.text_of(self.source, rows, captions), part)

    def _from_cache(self, part: Slice) -> TrainingBatch:
        assert self._cache is not None
        cache = self._cache
        if self.order is not None:
            places = [self._place(*self.order.at(index)[1:]) for index in part.indexes]
        else:
            places = list(part.indexes)
        chosen = torch.tensor(places)
        texts = [
            self._chosen(cache.captions[place], index, self._in_order(place).uid if self.sampler else "")
            for place, index in zip(places, part.indexes, strict=True)
        ]
        captions = torch.tensor([cache.number[text] for text in texts])
        return self._batch(cache.latents[chosen], cache.text[captions], cache.mask[captions], part)

    def _place(self, shard: int, row: int) -> int:
        return row + (int(self._ends[shard - 1]) if shard else 0)

    # -- the cache

    def _fill(self, limit: int) -> _Cache | None:
        """Encode the whole split, each rank a part of it, or None where that would take more than `limit` bytes."""
        first = self.source.read(self._in_order(0), self.split)
        one = self.encoders.latents_of(self.source, [first])[0]
        # Distinct captions are not known before all are read; those of the first sample for every one is a guess with
        # several captions each, and the most there can be with one.
        each = len(self._choices(first)) * (self.null_text.numel() + self.null_mask.numel())
        if self.samples * (one.numel() + each) * 4 > limit:
            return None
        texts: dict[int, list[Caption]] = {}
        latents = torch.zeros(self.samples, *one.shape)
        for start, mine in self._chunks(self.samples, ENCODE_IMAGES):
            samples = (
                [
                    self.source.read(self._in_order(place), self.split)
                    for place in range(start, min(start + ENCODE_IMAGES, self.samples))
                ]
                if mine
                else []
            )
            if mine:
                latents[start : start + len(samples)] = self.encoders.latents_of(self.source, samples)
                texts.update({start + offset: self._choices(sample) for offset, sample in enumerate(samples)})
        self.share(latents)
        plain = ([[one.text, one.source, one.score] for one in texts.get(place, [])] for place in range(self.samples))
        gathered = self._gather([json.dumps(captions).encode() if captions else b"" for captions in plain])
        captions = [[Caption(*one) for one in json.loads(mine)] for mine in gathered]
        distinct = sorted({one.text for choices in captions for one in choices})
        number = {text: place for place, text in enumerate(distinct)}
        owners = {one.text: place for place, choices in enumerate(captions) for one in choices}
        text = torch.zeros(len(distinct), *self.null_text.shape)
        mask = torch.zeros(len(distinct), *self.null_mask.shape)
        for start, mine in self._chunks(len(distinct), ENCODE_CAPTIONS):
            if mine:
                part = distinct[start : start + ENCODE_CAPTIONS]
                text[start : start + len(part)], mask[start : start + len(part)] = self.encoders.text_of(
                    self.source, [self._in_order(owners[one]) for one in part], part
                )
        self.share(text)
        self.share(mask)
        # Columns that no caption of the snapshot reaches are padding everywhere: attention gives them weight 0 exactly.
        length = max(1, int(mask.any(0).nonzero().max()) + 1, int(self.null_mask.sum()))
        self.say(
            f"{self.split}: {self.samples:,} samples and {len(distinct):,} captions encoded and kept in memory "
            f"({(latents.numel() + text[:, :length].numel()) * 4 / 1e6:,.0f} MB)"
        )
        return _Cache(
            latents,
            captions,
            number,
            text[:, :length].clone(),
            mask[:, :length].clone(),
        )

    def _in_order(self, place: int) -> Row:
        shard = int(np.searchsorted(self._ends, place, side="right"))
        return self.source.rows(shard, self.split)[place - (int(self._ends[shard - 1]) if shard else 0)]

    def _chunks(self, count: int, size: int) -> Iterator[tuple[int, bool]]:
        """(start, whether this rank does it): chunks are fixed by the data, so their numbers are too."""
        for number, start in enumerate(range(0, count, size)):
            yield start, number % self.workers == self.rank

    def _gather(self, mine: list[bytes]) -> list[bytes]:
        """Every rank's strings put together, where each place is filled by exactly one rank."""
        if self.workers == 1:
            return mine
        lengths = self.share(torch.tensor([len(text) for text in mine], dtype=torch.int64))
        ends = torch.cumsum(lengths, 0).tolist()
        flat = torch.zeros(ends[-1], dtype=torch.uint8)
        starts = [0, *ends[:-1]]
        for text, start in zip(mine, starts, strict=True):
            if text:
                flat[start : start + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        everything = self.share(flat).numpy().tobytes()
        return [everything[start:end] for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class _Cache:
    """latents (N, C, h, w) and the captions of each; number points from a caption into text (T, L, C), mask (T, L)."""

    latents: Tensor
    captions: list[list[Caption]]
    number: dict[str, int]
    text: Tensor
    mask: Tensor


def training_batches(samples: SnapshotSamples, encoders: Encoders, *, split: str = "train", **options: Any) -> Batches:
    """Shuffled batches to learn from. Raises DataError when asked for any split but "train"."""
    if split != "train":
        raise DataError(
            f"training was asked for the split {split!r} of snapshot {samples.id}: held-out rows are never trained on; "
            "only validation reads them"
        )
    return Batches(samples, "train", encoders, **options)


def validation_batches(samples: SnapshotSamples, encoders: Encoders, *, limit: int, **options: Any) -> Batches | None:
    """The first `limit` held-out samples, in a fixed order; None where the snapshot holds none out."""
    if limit == 0 or not sum(samples.counts("held_out")):
        return None
    return Batches(samples, "held_out", encoders, shuffled=False, limit=limit, seed=0, **options)
