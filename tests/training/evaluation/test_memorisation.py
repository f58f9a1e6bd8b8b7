"""Planted copies are found at the rates they were planted with, and not where nothing was copied."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.demo.world import draw, edited, encode, sample_scene
from pipelines.runner import SHIPPED_MODELS
from stages.clip_score import ClipScore
from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.hashing import PerceptualHash
from tests.training.small import write_snapshot
from training.evaluation.memorisation import Pictures, calibrated, contamination, copies, nearest, times_planted

TIMES = (1, 2, 8, 64)
# How often a model repeats a picture that stood so often in its training set: the planted rates.
REPEATS = {1: 0.0, 2: 0.1, 8: 0.5, 64: 0.95}


def _looked_at(pictures: list[Image.Image]) -> Pictures:
    images = [EncodedImage(encode(picture, "png")) for picture in pictures]
    batch = Batch({"caption": ["a circle"] * len(images)}, images)
    clip = ClipScore(model="clip", compute_batch=64).open(Context(models=(str(SHIPPED_MODELS),)))(batch)
    return Pictures.of(clip.values["image_embedding"], PerceptualHash().open(Context())(batch).values["phash64"])


def _scene(seed: int) -> Image.Image:
    """A drawing of two things: two of one thing may be alike by chance, and would then count as copies, rightly."""
    rng = np.random.default_rng([seed, 5])
    scene = next(scene for scene in iter(lambda: sample_scene(rng), None) if len(scene.things) == 2)
    return draw(scene, 48, rng)


def _repeated(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A copy as a model would make it: a little noise, a little brighter, compressed."""
    noisy = np.asarray(picture, np.float32) + rng.normal(0, 3, (48, 48, 3))
    changed = edited(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), "brighten", rng)
    return Image.open(io.BytesIO(encode(changed, "jpg", 88))).convert("RGB")


@pytest.fixture(scope="module")
def world() -> tuple[list[Image.Image], list[int], Pictures, Pictures]:
    """(distinct training pictures, how often each stands in the set, the whole set, held-out pictures)."""
    distinct = [_scene(number) for number in range(160)]
    times = [TIMES[number % 4] if number < 80 else 1 for number in range(160)]
    once = _looked_at(distinct)
    training = once.some(np.repeat(np.arange(160), times))
    return distinct, times, training, _looked_at([_scene(10_000 + number) for number in range(160)])


def _drawn(
    world: tuple[list[Image.Image], list[int], Pictures, Pictures], rate: Callable[[int], float]
) -> tuple[Pictures, list[int], dict[int, list[bool]]]:
    """Four drawings of each of the first 80 training captions; the places of their pictures; what was really copied."""
    distinct, times, _, _ = world
    starts = np.concatenate([[0], np.cumsum(times)])
    rng = np.random.default_rng(11)
    pictures, places, planted = [], [], {count: [] for count in TIMES}
    for number in range(80):
        for again in range(4):
            copied = rng.random() < rate(times[number])
            pictures.append(_repeated(distinct[number], rng) if copied else _scene(20_000 + 100 * number + again))
            places.append(int(starts[number]))
            planted[times[number]].append(bool(copied))
    return _looked_at(pictures), places, planted


def test_planted_copies_are_found_at_their_rates(world) -> None:
    _, times, training, held_out = world
    threshold = calibrated(held_out, training)
    drawn, places, planted = _drawn(world, REPEATS.__getitem__)
    found = copies(drawn, training, threshold, places)
    assert set(found.by_copies) == set(TIMES)
    for count in TIMES:
        true, said = np.mean(planted[count]), found.by_copies[count]
        assert said.low <= true <= said.high
        assert said.value == pytest.approx(true, abs=0.05)
    assert found.by_copies[64].low > found.by_copies[2].high
    whose = np.asarray(places)[found.is_copy]
    assert (np.abs(training.embeddings[found.near.place[found.is_copy]] - training.embeddings[whose]) < 1e-3).all()
    assert times_planted(training, places[::4]).tolist() == times[:80]


def test_nothing_is_found_in_a_model_that_never_saw_them(world) -> None:
    _, _, training, held_out = world
    threshold = calibrated(held_out, training)
    drawn, places, _ = _drawn(world, lambda count: 0.0)
    found = copies(drawn, training, threshold, places)
    assert found.overall.value == 0
    assert found.overall.high < 0.02
    assert threshold.false_alarms.value <= 1 / 80  # of drawings of so few things one in 80 may be alike by chance


def test_too_few_held_out_pictures_set_no_threshold(world) -> None:
    _, _, training, held_out = world
    with pytest.raises(ValueError, match="20 at least"):
        calibrated(held_out.some(slice(0, 10)), training)


def test_the_nearest_is_the_nearest() -> None:
    rng = np.random.default_rng(0)
    training = Pictures.of(list(rng.normal(size=(3000, 8))), list(range(3000)))
    some = training.some([5, 2999, 1024])
    found = nearest(Pictures(some.embeddings, np.array([4, 2999, 1024], np.uint64)), training)
    assert found.place.tolist() == [5, 2999, 1024]
    assert found.bits.tolist() == [1, 0, 0]


def test_contamination_counts_training_rows_alone(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.snapshot import open_snapshot

    folder = write_snapshot(tmp_path / "snapshot", shards=1, rows=12)
    manifest = open_snapshot(str(folder)).manifest
    ledger = pq.read_table(folder / "ledger/000000.parquet").to_pylist()
    kept = [row for row in ledger if row["verdict"] == "kept"]
    (folder / "captions").mkdir()
    texts = [{"uid": row["uid"], "caption_id": str(n), "source": "original", "text": f"Words  of {n}"}
             for n, row in enumerate(kept)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(texts), folder / "captions/000000.parquet")
    import json

    said = {**manifest, "files": {**manifest["files"], "captions/000000.parquet": {"digest": "0", "rows": 12}}}
    (folder / "manifest.json").write_text(json.dumps(said))
    train = [n for n, row in enumerate(kept) if row["split"] == "train"]
    held_out = [n for n, row in enumerate(kept) if row["split"] == "held_out"]
    asked = [f"words of {train[0]}", f"WORDS OF {train[1]} ", f"words of {held_out[0]}", "never'; DROP TABLE ledger"]
    ids = [kept[train[0]]["image_id"], kept[held_out[0]]["image_id"], ledger[1]["image_id"]]
    found = contamination({"snap": str(folder)}, asked, ids)
    assert (found.prompts, found.of_prompts, found.pictures, found.of_pictures) == (2, 4, 1, 3)
    assert contamination({}, asked, ids).problem == "it is not known what this model learned from"
    assert "where snapshot gone" in contamination({"gone": ""}, asked, ids).problem
