"""Cached features against features computed on the fly: the same batches, and what is refused."""

from __future__ import annotations

import pytest
import torch

from pipelines.recipe import load_recipe
from pipelines.runner import SHIPPED_MODELS, Options, curate
from pipelines.snapshot import Snapshot
from stages.autoencoders import open_autoencoder
from stages.text_encoders import open_text_encoder
from tests.pipelines import raw
from training.captions import CaptionSampler
from training.data import Batches, Encoders, SnapshotSamples, slices_of_step, training_batches
from training.features import CachedFeatures, StaleFeaturesError
from training.recipe import CaptionOptions

TEXT = {"folder": "text_encoder", "max_tokens": 12}
STAGES = {
    **raw.RECIPE["stages"],
    "latents": {"kind": "pixel_shuffle", "resolution": 32, "checked_fraction": 1.0, "after": ["near"]},
    "text_features": {"type": "text_embeddings", **TEXT, "after": ["near"]},
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder = tmp_path_factory.mktemp("features")
    given = {**raw.RECIPE, "stages": STAGES, "input": {"url": raw.write_world(folder / "raw", shards=2)}}
    return curate(load_recipe(given), Options(output=str(folder / "out"), engine="local", quiet=True, report=False))


def encoders(cached: CachedFeatures | None) -> Encoders:
    autoencoder = open_autoencoder({"type": "pixel_shuffle", "factor": 4})
    return Encoders(autoencoder, open_text_encoder(TEXT, models=(SHIPPED_MODELS,)), 32, "cpu", cached)


def batches(snapshot: Snapshot, cached: CachedFeatures | None, size: int) -> Batches:
    sampler = CaptionSampler(CaptionOptions(), 1)
    return training_batches(SnapshotSamples(snapshot), encoders(cached), seed=1, cache_bytes=size, sampler=sampler)


@pytest.mark.parametrize("size", [0, 10**8], ids=["streamed", "in memory"])
def test_cached_features_are_what_training_computes(snapshot: Snapshot, size: int) -> None:
    cached = CachedFeatures(snapshot, "latents", "text_features")
    ours = encoders(cached)
    cached.check(ours.autoencoder, 32, ours.text_encoder)
    read, computed = batches(snapshot, cached, size), batches(snapshot, None, size)
    for step in range(4):
        (part,) = slices_of_step(step, 4, 4, 0, 1)
        one, other = read.micro_batch(part), computed.micro_batch(part)
        assert torch.equal(one.latents_BCHW, other.latents_BCHW)
        assert torch.equal(one.mask_BL, other.mask_BL)
        kept = one.mask_BL.bool()
        torch.testing.assert_close(one.text_BLC[kept], other.text_BLC[kept], rtol=1e-5, atol=1e-5)
        assert (one.text_BLC[~kept] == 0).all()  # padding was not stored


def test_a_stale_cache_is_refused_with_what_differs(snapshot: Snapshot) -> None:
    cached, ours = CachedFeatures(snapshot, "latents", "text_features"), encoders(None)
    with pytest.raises(StaleFeaturesError, match=r"another resolution \(32, training has 64\)"):
        cached.check(ours.autoencoder, 64, ours.text_encoder)
    with pytest.raises(StaleFeaturesError, match="another autoencoder"):
        cached.check(open_autoencoder({"type": "pixel_shuffle", "factor": 8}), 32, ours.text_encoder)
    longer = open_text_encoder({**TEXT, "max_tokens": 20}, models=(SHIPPED_MODELS,))
    with pytest.raises(StaleFeaturesError, match=r"another max_tokens \(12, training has 20\)"):
        cached.check(ours.autoencoder, 32, longer)
    with pytest.raises(StaleFeaturesError, match="no stage 'latent' of type latents; it has latents"):
        CachedFeatures(snapshot, "latent", None)


def test_a_caption_without_features_is_refused(snapshot: Snapshot) -> None:
    row = SnapshotSamples(snapshot).rows(0, "train")[0]
    with pytest.raises(StaleFeaturesError, match="no features of the caption 'never seen'"):
        CachedFeatures(snapshot, None, "text_features").text("shards/000000.tar", row.uid, "never seen", 8)


def test_what_the_autoencoder_loses_is_measured(snapshot: Snapshot) -> None:
    rows = [row for table in snapshot.tables("ledger") for row in table.to_pylist() if row["verdict"] == "kept"]
    assert rows
    assert {(row["latents.psnr"], row["latents.ssim"]) for row in rows} == {(100.0, 1.0)}  # pixel shuffle loses nothing
