"""Which caption is learnt from: frequencies against the formulas, written out naively, and what a choice depends on."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare

from pipelines.packing import CAPTIONS_SCHEMA
from pipelines.snapshot import open_snapshot
from tests.training.small import write_snapshot
from tests.training.test_data import ENCODERS, Words
from training.captions import Caption, CaptionSampler, usable_captions
from training.data import SnapshotSamples, slices_of_step, training_batches
from training.recipe import CaptionOptions, RecipeError, load_recipe

SCORED = [Caption("one", "original", 0.20), Caption("two", "synthetic", 0.26), Caption("three", "synthetic", 0.28)]
DRAWS = 20_000


def frequencies(captions: list[Caption], epoch: int = 0, **options) -> Counter[str]:
    sampler = CaptionSampler(CaptionOptions(**options), seed=5)
    return Counter(sampler.choose(captions, f"uid{number}", epoch).text for number in range(DRAWS))


def assert_follows(counted: Counter[str], expected: dict[str, float]) -> None:
    """A chi-square test that a right sampler fails once in a million seeds; this seed is fixed."""
    assert set(counted) <= set(expected)
    assert chisquare([counted[text] for text in expected], [DRAWS * p for p in expected.values()]).pvalue > 1e-6


def test_softmax_is_the_papers_formula() -> None:
    weights = {one.text: math.exp(one.score * 100 / 4) for one in SCORED}
    expected = {text: weight / sum(weights.values()) for text, weight in weights.items()}
    assert_follows(frequencies(SCORED, weighting="softmax", temperature=4), expected)


def test_power_law_is_the_codes_formula() -> None:
    weights = {one.text: (one.score * 100) ** (1 / 0.3) for one in SCORED}
    expected = {text: weight / sum(weights.values()) for text, weight in weights.items()}
    assert_follows(frequencies(SCORED, weighting="power", temperature=0.3), expected)


def test_a_wrong_temperature_is_noticed() -> None:
    weights = {one.text: (one.score * 100) ** (1 / 0.4) for one in SCORED}
    expected = {text: weight / sum(weights.values()) for text, weight in weights.items()}
    with pytest.raises(AssertionError):
        assert_follows(frequencies(SCORED, weighting="power", temperature=0.3), expected)


def test_the_power_law_knows_no_scale_and_the_softmax_does() -> None:
    halved = [Caption(one.text, one.source, one.score / 2) for one in SCORED]
    for weighting, same in (("power", True), ("softmax", False)):
        sampler = CaptionSampler(CaptionOptions(weighting=weighting, temperature=1), 0)
        assert bool(abs(sampler.weights(halved) - sampler.weights(SCORED)).max() < 1e-12) is same


@pytest.mark.parametrize("weighting", ["softmax", "power"])
def test_cold_weights_stay_finite_and_choose_the_best(weighting: str) -> None:
    sampler = CaptionSampler(CaptionOptions(weighting=weighting, temperature=1e-6), 0)
    weights = sampler.weights([*SCORED, Caption("below nothing", score=-0.1), Caption("not scored")])
    assert weights.sum() == pytest.approx(1)
    assert list(weights[3:]) == [0, 0]
    # The power law's temperature never falls below 0.01, so that even near-equal scores keep a share.
    best, second = weights[2], weights[1]
    assert (best, second) == ((1, 0) if weighting == "softmax" else pytest.approx((1, (26 / 28) ** 100), abs=1e-3))


def test_blend_ratio_where_both_kinds_are_there() -> None:
    counted = frequencies(SCORED, synthetic_fraction=0.3)
    assert_follows(counted, {"one": 0.7, "two": 0.15, "three": 0.15})
    assert set(frequencies(SCORED[:1], synthetic_fraction=1)) == {"one"}
    assert set(frequencies(SCORED[1:], synthetic_fraction=0)) == {"two", "three"}


def test_threshold_leaves_the_passing_or_the_best() -> None:
    assert set(frequencies(SCORED, threshold=25)) == {"two", "three"}
    assert set(frequencies(SCORED, threshold=90)) == {"three"}
    assert set(frequencies([*SCORED, Caption("not scored")], threshold=25)) == {"two", "three"}
    assert set(frequencies([Caption("a"), Caption("b")], threshold=25)) == {"a", "b"}


def test_captions_grow_longer() -> None:
    lengths = [Caption(" ".join(["word"] * count)) for count in (3, 6, 12, 40)]
    options = {"words_first": 4, "words_last": 12, "words_epochs": 3}
    longest = [max(len(text.split()) for text in frequencies(lengths, epoch, **options)) for epoch in range(5)]
    assert longest == [3, 6, 12, 40, 40]
    assert set(frequencies(lengths[2:], 0, **options)) == {lengths[2].text}  # nothing fits: the shortest stays


def test_a_choice_depends_on_seed_epoch_and_uid_alone() -> None:
    def choices(seed: int, epoch: int) -> list[str]:
        sampler = CaptionSampler(CaptionOptions(), seed)
        return [sampler.choose(SCORED, f"uid{number}", epoch).text for number in range(200)]

    assert choices(1, 2) == choices(1, 2)
    assert choices(1, 2) != choices(1, 3)
    assert choices(1, 2) != choices(2, 2)


def test_half_a_curriculum_is_refused() -> None:
    with pytest.raises(RecipeError, match="words_first, words_last and words_epochs"):
        load_recipe({"captions": {"words_first": 4}})


def test_only_usable_captions_each_once() -> None:
    row = {"caption_id": "b", "source": "synthetic", "text": "a cat", "clip_score": 0.3, "status": "success"}
    refused = {**row, "caption_id": "c", "status": "refused"}
    original = {**row, "caption_id": "a", "source": "original", "status": "ok", "clip_score": None}
    found = usable_captions([row, row, refused, original, {**original, "caption_id": "0", "text": " "}])
    assert found == [Caption("a cat", "original", None), Caption("a cat", "synthetic", 0.3)]


# --- from a snapshot -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> SnapshotSamples:
    """A snapshot whose captions tables hold the original and two synthetic captions of every sample."""
    folder = write_snapshot(tmp_path_factory.mktemp("captions") / "snapshot")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "captions").mkdir()
    for ledger in sorted(folder.glob("ledger/*.parquet")):
        rows = []
        for uid in pq.read_table(ledger, filters=[("verdict", "=", "kept")])["uid"].to_pylist():
            for text, source, status in (
                (f"first of {uid[:4]}", "synthetic", "success"),
                (f"second of {uid[:4]}", "synthetic", "success"),
                ("I cannot see that", "synthetic", "refused"),
                ("a red bar", "original", "ok"),
            ):
                digest = hashlib.sha256(f"{uid}{text}".encode()).hexdigest()[:32]
                rows.append({"uid": uid, "caption_id": digest, "source": source, "text": text, "status": status})
        pq.write_table(pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA), folder / f"captions/{ledger.name}")
        manifest["files"][f"captions/{ledger.name}"] = {"digest": "0" * 32, "rows": len(rows)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return SnapshotSamples(open_snapshot(str(folder)))


def test_training_learns_from_the_chosen_captions_cached_or_not(captioned: SnapshotSamples) -> None:
    sampler = CaptionSampler(CaptionOptions(synthetic_fraction=0.5), seed=3)
    cached, streamed = (
        training_batches(captioned, ENCODERS, seed=3, sampler=sampler, cache_bytes=size) for size in (10**8, 0)
    )
    texts = set()
    for step in range(15):  # 40 samples: three epochs and a half
        (part,) = slices_of_step(step, 8, 8, 0, 1)
        one, other = cached.micro_batch(part), streamed.micro_batch(part)
        assert one.text_BLC.shape[1] <= other.text_BLC.shape[1]
        assert (one.text_BLC == other.text_BLC[:, : one.text_BLC.shape[1]]).all()
        for index, features in zip(part.indexes, other.text_BLC, strict=True):
            row = streamed.row(index)
            text = sampler.choose(captioned.captions(captioned.read(row, "train")), row.uid, index // 40).text
            assert (Words().encode([text])[0][0] == features).all()
            texts.add(text)
    assert "a red bar" in texts
    assert len(texts) > 35  # of 80 synthetic ones, each missed by three epochs with probability 0.42
    assert not any("cannot" in text for text in texts)


def test_without_options_the_original_beside_the_picture_is_learnt_from(captioned: SnapshotSamples) -> None:
    data = training_batches(captioned, ENCODERS, seed=0, cache_bytes=0)
    (part,) = slices_of_step(0, 8, 8, 0, 1)
    texts = [captioned.read(data.row(index), "train").caption for index in part.indexes]
    assert (data.micro_batch(part).text_BLC == Words().encode(texts)[0]).all()
