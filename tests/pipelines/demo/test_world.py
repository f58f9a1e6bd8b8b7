"""The made-up world: same seed, same bytes; every flaw is what the truth table says; no two scenes pass for one."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo import world
from pipelines.demo.world import EDITS, FLAW_RATES, KINDS, RELATIONS, Scene, Thing, make_world

SCENES = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    summary = make_world(tmp_path_factory.mktemp("world"), scenes=SCENES, seed=3, shard_size=100)
    data, texts, details = {}, {}, {}
    for shard in summary.shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                content = tar.extractfile(member).read()
                if extension == "txt":
                    texts[key] = content.decode()
                elif extension == "json":
                    details[key] = json.loads(content)
                else:
                    data[key] = content
    truth = pq.read_table(summary.truth).to_pylist()
    return SimpleNamespace(
        summary=summary, data=data, texts=texts, details=details, truth=truth, rows={row["key"]: row for row in truth}
    )


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        make_world(folder, scenes=40, seed=seed, shard_size=25)
    names = sorted(file.name for file in folders[0].iterdir())
    assert names == ["00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json", "truth.parquet"]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert (folders[0] / "00000.tar").read_bytes() != (folders[2] / "00000.tar").read_bytes()


def test_every_flaw_is_planted_at_its_rate(made: SimpleNamespace) -> None:
    counts = Counter(row["kind"] for row in made.truth)
    planted = {kind: round(rate * SCENES) for kind, rate in FLAW_RATES.items()}
    assert {kind: counts[kind] for kind in planted} == planted
    duplicates = planted["byte_duplicate"] + planted["near_duplicate"]
    assert sum(counts.values()) == len(made.data) == made.summary.rows == SCENES + duplicates
    assert set(made.summary.edits) == set(EDITS)
    assert min(made.summary.edits.values()) >= 4
    assert set(counts) == set(KINDS)


def test_shards_have_the_layout_of_img2dataset(made: SimpleNamespace) -> None:
    with tarfile.open(made.summary.shards[1]) as tar:
        members = tar.getmembers()
    assert {member.mtime for member in members} == {0}
    assert [member.name.split(".")[1] for member in members[:3]][1:] == ["txt", "json"]
    stats = json.loads((made.summary.folder / "00001_stats.json").read_text())
    assert stats["count"] == stats["successes"] == len(members) // 3 == 100
    for row in made.truth:
        assert made.details[row["key"]]["key"] == row["key"] == f"{int(row['shard'][:5]):05d}{row['index']:04d}"
        assert made.details[row["key"]]["caption"] == made.texts[row["key"]] == row["caption"]


def test_broken_files_do_not_open_and_all_others_do(made: SimpleNamespace) -> None:
    for row in made.truth:
        if row["kind"] in ("corrupt", "truncated"):
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the decoder raises
                picture(made.data[row["key"]])
        else:
            size = picture(made.data[row["key"]]).size
            assert min(size) == 24 if row["kind"] == "too_small" else min(size) >= 70


def test_copies_name_their_original_which_keeper_order_keeps(made: SimpleNamespace) -> None:
    copies = [row for row in made.truth if row["original_key"]]
    assert {row["kind"] for row in copies} == {"byte_duplicate", "near_duplicate"}
    for row in copies:
        original = made.rows[row["original_key"]]
        assert original["kind"] == "clean"
        assert original["scene"] == row["scene"]
        copy, first = made.data[row["key"]], made.data[original["key"]]
        if row["kind"] == "byte_duplicate":
            assert copy == first
            assert row["key"] > original["key"]
        else:
            pixels = [size[0] * size[1] for size in (picture(copy).size, picture(first).size)]
            assert (pixels[0], len(copy)) < (pixels[1], len(first))


def test_captions_are_false_exactly_where_the_truth_table_says(made: SimpleNamespace) -> None:
    for row in made.truth:
        if row["kind"] in ("swapped_caption", "swapped_attributes", "swapped_relation", "boilerplate"):
            assert row["caption"] != row["true_caption"]
            assert not says(row["caption"], Scene.from_json(row["scene"])), row
        else:
            assert row["caption"] == row["true_caption"]
        assert says(row["true_caption"], Scene.from_json(row["scene"])), row


def says(text: str, scene: Scene) -> bool:
    """A reading of a caption that shares no code with the writer: is every word of it true of the scene?"""
    words = text.lower().replace(".", "").split()
    sizes = {"big": "large", "large": "large", "small": "small", "little": "small"}
    colours = [word for word in words if word in world.COLOURS]
    shapes = [word for word in words if word in world.SHAPES]
    said = [sizes[word] for word in words if word in sizes]
    relation = next((word for word in ("above", "below", "left", "right") if word in words), None)
    things = list(scene.things)
    relation_of_scene = (scene.relation or "").replace(" of", "") or None
    if relation and colours[:1] != [things[0].colour]:
        things.reverse()
        opposite = {"above": "below", "below": "above", "left": "right", "right": "left"}
        relation_of_scene = opposite.get(relation_of_scene or "")
    return (
        colours == [thing.colour for thing in things]
        and shapes == [thing.shape for thing in things]
        and said in ([], [thing.size for thing in things])
        and relation == relation_of_scene
    )


def test_near_duplicates_lie_within_the_radius_and_no_two_scenes_pass_for_one(made: SimpleNamespace) -> None:
    opened = {key: picture(data).convert("RGB") for key, data in made.data.items() if opens(made.rows[key])}
    bits = {key: imagehash.phash(image).hash.ravel() for key, image in opened.items()}
    looks = {
        key: np.asarray(image.resize((8, 8), Image.Resampling.BOX), float).ravel() for key, image in opened.items()
    }

    edits = [row for row in made.truth if row["kind"] == "near_duplicate"]
    near = [(bits[row["key"]] != bits[row["original_key"]]).sum() <= 8 for row in edits]
    assert np.mean(near) >= 0.95
    assert max(difference(looks[row["key"]], looks[row["original_key"]]) for row in edits) < 0.03

    keys = [row["key"] for row in made.truth if row["key"] in opened and not row["original_key"]]
    table = np.array([bits[key] for key in keys])
    for i, key in enumerate(keys):
        for j in np.flatnonzero((table[:i] != table[i]).sum(1) <= 8):
            assert difference(looks[key], looks[keys[j]]) > 0.04, (made.rows[key], made.rows[keys[j]])


def opens(row: dict) -> bool:
    return row["kind"] not in ("corrupt", "truncated")


def difference(left: np.ndarray, right: np.ndarray) -> float:
    gain = (left @ right) / (left @ left)
    return float(np.abs(left * gain - right).mean() / 255)


def test_drawn_things_lie_inside_the_picture_apart_and_as_the_relation_says() -> None:
    rng = np.random.default_rng(0)
    for relation in RELATIONS:
        for _ in range(200):
            scene = Scene((Thing("red", "square", "large"), Thing("blue", "square", "large")), relation)
            (x0, y0, d0), (x1, y1, d1) = world.layout(scene, rng)
            along, across = (y0 - y1, x0 - x1) if relation in ("above", "below") else (x0 - x1, y0 - y1)
            assert (along < 0) == (relation in ("above", "left of"))
            assert abs(along) > abs(across)
            assert abs(along) > 0.45 * (d0 + d1)
            for centre, diameter in ((x0, d0), (y0, d0), (x1, d1), (y1, d1)):
                assert diameter / 2 < centre < 1 - diameter / 2


def test_prompts_are_distinct_true_and_repeatable() -> None:
    asked = world.prompts(200, seed=4)
    assert asked == world.prompts(200, seed=4)
    assert len({prompt for prompt, _ in asked}) == 200
    assert all(says(prompt, scene) for prompt, scene in asked)


def test_impossible_worlds_are_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown flaw 'blurry'"):
        make_world(tmp_path, scenes=10, flaw_rates={"blurry": 0.1})
    with pytest.raises(ValueError, match="do not fit 10 scenes"):
        make_world(tmp_path, scenes=10, flaw_rates={"ugly": 1.0})
