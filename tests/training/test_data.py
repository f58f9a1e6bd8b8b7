"""Batches from a snapshot: who is in them, what they hold, and what is refused."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.snapshot import open_snapshot
from tests.training.small import write_snapshot
from training.data import (
    Batches,
    DataError,
    Encoders,
    Order,
    SnapshotSamples,
    pixels_of,
    slices_of_step,
    training_batches,
    validation_batches,
)


class Words:
    """A text encoder that counts words; its numbers depend on nothing but the caption."""

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.zeros(len(captions), 12, 4)
        mask = torch.zeros(len(captions), 12)
        for row, caption in enumerate(captions):
            words = ["<bos>", *caption.split()]
            mask[row, : len(words)] = 1
            for place, word in enumerate(words):
                features[row, place] = torch.tensor([len(word), ord(word[0]), ord(word[-1]), place]) / 100
        return features, mask


class Plain:
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(pixels, 4)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshot(tmp_path_factory.mktemp("data") / "snapshot", shards=3, rows=18)


@pytest.fixture
def samples(snapshot: Path) -> SnapshotSamples:
    return SnapshotSamples(open_snapshot(str(snapshot)))


ENCODERS = Encoders(Plain(), Words(), 16)


def batches(samples: SnapshotSamples, **options: Any) -> Batches:
    return training_batches(samples, ENCODERS, **{"seed": 0, "cache_bytes": 10**8, **options})


# --- who -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 64])
def test_an_epoch_is_every_sample_once(window: int) -> None:
    counts = [5, 0, 3, 9, 1]
    order = Order(counts, seed=3, window=window)
    for epoch in (0, 1):
        drawn = [order.at(index) for index in range(epoch * 18, (epoch + 1) * 18)]
        assert {one[0] for one in drawn} == {epoch}
        assert sorted(one[1:] for one in drawn) == [(s, row) for s, n in enumerate(counts) for row in range(n)]
    first, second = ([order.at(index)[1:] for index in range(e * 18, (e + 1) * 18)] for e in (0, 1))
    assert first != second
    # A resumed run asks for late indexes first.
    assert [Order(counts, seed=3, window=window).at(index) for index in range(35, -1, -1)] == [
        order.at(index) for index in range(35, -1, -1)
    ]
    assert [Order(counts, seed=4, window=window).at(index)[1:] for index in range(18)] != first


def test_a_window_keeps_to_its_shards() -> None:
    order = Order([10] * 12, seed=0, window=3)
    for start in range(0, 120, 30):
        assert len({order.at(index)[1] for index in range(start, start + 30)}) == 3


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 24), (1, 4), (2, 4), (3, 2), (4, 6)])
def test_a_global_batch_is_the_same_whoever_runs_it(workers: int, micro_batch: int) -> None:
    parts = [part for rank in range(workers) for part in slices_of_step(7, 24, micro_batch, rank, workers)]
    assert [place for part in parts for place in part.positions] == list(range(24))
    assert [index for part in parts for index in part.indexes] == list(range(7 * 24, 8 * 24))
    assert {len(part.positions) for part in parts} == {micro_batch}


# --- what ------------------------------------------------------------------------------------------------------------


def test_batches_hold_what_the_snapshot_keeps(samples: SnapshotSamples) -> None:
    data = batches(samples)
    assert data.samples == 45
    part = slices_of_step(0, 8, 8, 0, 1)[0]
    batch = data.micro_batch(part)
    assert batch.latents_BCHW.shape == (8, 48, 4, 4)
    assert batch.position_B.tolist() == list(range(8))
    # "a wide red bar" and <bos>: what no caption reaches is cut off.
    assert batch.text_BLC.shape == (8, 5, 4)
    assert batch.null_text_LC.shape == (5, 4)
    assert batch.null_mask_L.tolist() == [1, 0, 0, 0, 0]
    row = data.row(0)
    image = samples.read(row, "train")
    assert torch.equal(batch.latents_BCHW[0], Plain().encode(pixels_of(image.image, 16)[None])[0])
    assert torch.equal(batch.text_BLC[0], Words().encode([image.caption])[0][0, :5])
    assert data.uids(part)[0] == row.uid


def test_streaming_gives_what_the_cache_gives(samples: SnapshotSamples) -> None:
    cached, streamed = batches(samples), batches(samples, cache_bytes=0)
    parts = slices_of_step(0, 12, 6, 0, 1) + slices_of_step(1, 12, 6, 0, 1)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        kept, read = cached.micro_batch(part), streamed.micro_batch(part, following)
        assert torch.equal(kept.latents_BCHW, read.latents_BCHW)
        assert torch.equal(kept.text_BLC, read.text_BLC[:, :5])
        assert torch.equal(kept.mask_BL, read.mask_BL[:, :5])


def test_pixels_are_resized_and_cropped_from_the_middle() -> None:
    import io

    from PIL import Image

    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255
    stream = io.BytesIO()
    Image.fromarray(wide).save(stream, "PNG")
    pixels = pixels_of(stream.getvalue(), 20)
    assert pixels.shape == (3, 20, 20)
    assert pixels.min() == 1.0
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    stream = io.BytesIO()
    transparent.save(stream, "PNG")
    assert pixels_of(stream.getvalue(), 8).min() == 1.0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_held_out_rows_are_never_trained_on(samples: SnapshotSamples) -> None:
    with pytest.raises(DataError, match=r"held-out rows are never trained on"):
        training_batches(samples, ENCODERS, split="held_out", seed=0)
    data, held_out = batches(samples), validation_batches(samples, ENCODERS, limit=100, cache_bytes=10**8)
    assert held_out is not None
    trained = {data.row(index).uid for index in range(data.samples)}
    kept_apart = {held_out.row(index).uid for index in range(held_out.samples)}
    assert len(trained) == 45
    assert len(kept_apart) == held_out.samples == 9
    assert not trained & kept_apart
    assert held_out.split == "held_out"


def _rewritten(source: Path, target: Path, change: Any) -> SnapshotSamples:
    """A copy of a snapshot whose first shard's members went through `change(name, content)`."""
    import io
    import shutil

    shutil.copytree(source, target)
    path = target / "shards" / "000000.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            changed = change(name, content)
            if changed is not None:
                member = tarfile.TarInfo(name)
                member.size = len(changed)
                tar.addfile(member, io.BytesIO(changed))
    return SnapshotSamples(open_snapshot(str(target)))


def test_a_shard_that_says_held_out_is_not_trained_on(snapshot: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(".json"):
            return content
        return json.dumps({**json.loads(content), "split": "held_out"}).encode()

    with pytest.raises(DataError, match="refusing to train on it"):
        batches(_rewritten(snapshot, tmp_path / "s", change))


def test_another_image_under_the_same_key_is_refused(snapshot: Path, tmp_path: Path) -> None:
    changed = _rewritten(
        snapshot, tmp_path / "s", lambda name, content: content + b"x" if name.endswith("png") else content
    )
    with pytest.raises(DataError, match="is not the image that the ledger names"):
        batches(changed)


def test_a_missing_member_is_named(snapshot: Path, tmp_path: Path) -> None:
    gone = _rewritten(snapshot, tmp_path / "s", lambda name, content: None if name == "000000000003.txt" else content)
    with pytest.raises(DataError, match=r"sample 000000000003 has members"):
        batches(gone)


def test_members_of_other_kinds_are_not_looked_at(snapshot: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return content

    found = _rewritten(snapshot, tmp_path / "s", change)
    with tarfile.open(tmp_path / "s" / "shards" / "000000.tar", "a") as tar:
        import io

        for name in ("000000000000.pickle", "../000000000001.png.pyd"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"\x80\x04."))
    assert batches(found).samples == 45


def test_a_ledger_that_does_not_match_the_manifest(snapshot: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(snapshot, tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["shards"][1]["count"] += 1
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the manifest counts 16 train rows in this shard and the ledger holds 15"):
        batches(SnapshotSamples(open_snapshot(str(tmp_path / "s"))))


def test_a_snapshot_without_rows_to_train_on(tmp_path: Path) -> None:
    everything_held_out = write_snapshot(tmp_path / "s", shards=1, rows=3, held_out_every=1)
    with pytest.raises(DataError, match="keeps no row of the split train"):
        batches(SnapshotSamples(open_snapshot(str(everything_held_out))))
