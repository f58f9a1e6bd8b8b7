"""What a guard drops is looked at by no model, kept in no features and shown on no page; safety rules likewise."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.lineage.ledger import open_ledger
from pipelines.plan import check_flow
from pipelines.recipe import load_recipe
from pipelines.report.pages import samples_page, snapshot_page
from pipelines.runner import Options, curate, select
from pipelines.snapshot import Snapshot
from tests.pipelines import raw
from tests.pipelines.report.reading import assert_inert

ROWS = 12
STAGES = {
    "decode": {},
    "text": {"type": "text_quality"},
    "hash": {"type": "perceptual_hash"},
    "clip": {"type": "clip_score", "model": "clip", "compute_batch": 16},
}


def colour(number: int) -> tuple[int, int, int]:
    return (20 * number, 255 - 20 * number, 128)


def picture(number: int) -> Image.Image:
    """A picture that can be told on a page by the colour of its middle."""
    image = raw.picture(number, (64, 64))
    image.paste(colour(number), (16, 16, 48, 48))
    return image


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    members = []
    for number in range(ROWS):
        data = io.BytesIO()
        picture(number).save(data, "PNG")
        caption = "IMG_0001.jpg" if number == 2 else f"SECRET{number} photo of a number"
        url = "https://sub.example.com/x.jpg" if number == 3 else f"https://other.example/{number}.jpg"
        members += [
            (name.replace(".jpg", ".png"), body)
            for name, body in raw.sample(f"{number:09d}", data.getvalue(), caption, url=url)
        ]
    raw.write_tar(folder / "00000.tar", members)
    # Known bad: row 0 by its bytes, row 1 and row 2 (whose caption is bad besides) by a hash 2 bits away.
    hashes = [int(str(imagehash.phash(picture(number))), 16) for number in (1, 2)]
    first = io.BytesIO()
    picture(0).save(first, "PNG")
    lines = [hashlib.sha256(first.getvalue()).hexdigest(), *(f"{one ^ 0b11:016x}" for one in hashes)]
    (folder / "bad.txt").write_text("\n".join(lines))
    return folder


def recipe_of(world: Path, **more: dict) -> dict:
    return {
        "input": {"url": str(world / "00000.tar")},
        "stages": STAGES | more.pop("stages", {}),
        "rules": {
            "caption": {"column": "text.flaw", "is_null": True},
            "known_bad": {"type": "known_bad", "file": str(world / "bad.txt"), "phash": "hash.phash64", "radius": 2},
            "opt_out": {"type": "opt_out", "domains": ["example.com"]},
            **more.pop("rules", {}),
        },
        "held_out": {"fraction": 0},
    }


@pytest.fixture(scope="module")
def guarded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    output = tmp_path_factory.mktemp("out")
    return curate(load_recipe(recipe_of(world)), Options(output=str(output), engine="local", quiet=True))


def rows_of(snapshot: Snapshot, kind: str = "ledger") -> list[dict]:
    rows = [row for table in snapshot.tables(kind) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["index"])


def colours_on(page: str) -> set[int]:
    """Which pictures a page embeds, told by the colour of their middle."""
    found = set()
    for image in assert_inert(page).all("img"):
        data = base64.b64decode(image.attributes["src"].partition(",")[2])
        middle = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        middle = middle[middle.shape[0] // 2, middle.shape[1] // 2].astype(int)
        found.add(min(range(ROWS), key=lambda number: abs(middle - colour(number)).sum()))
    return found


def test_each_is_dropped_with_its_reason(guarded: Snapshot) -> None:
    rows = rows_of(guarded)
    assert [row["reason"] for row in rows[:4]] == [
        "known bad: sha256",
        "known bad: pHash 2 bits away",
        "text.flaw: file name",
        "opt-out: domain example.com",
    ]
    assert rows[2]["failed_rules"] == ["caption", "known_bad"]
    assert [row["verdict"] for row in rows[4:]] == ["kept"] * (ROWS - 4)


def test_no_model_looked_at_them_and_no_feature_is_kept(guarded: Snapshot) -> None:
    for row, features in zip(rows_of(guarded), rows_of(guarded, "features"), strict=True):
        looked_at = row["verdict"] == "kept"
        assert (row["clip.score"] is not None) == looked_at
        assert (features["clip.image_embedding"] is not None) == looked_at
        assert (features["hash.thumbnail"] is not None) == looked_at
        assert (row["clip.error"] or "").startswith("not_measured(") != looked_at


def test_no_page_shows_them_or_their_captions(guarded: Snapshot) -> None:
    for page in (snapshot_page(guarded.folder.url), samples_page(guarded.folder.url)):
        assert colours_on(page) == set(range(4, ROWS))
        assert "picture withheld" in page
        assert "SECRET4 " in page
        assert not [number for number in range(4) if f"SECRET{number} " in page]


def test_the_command_prints_none_of_their_captions_either(guarded: Snapshot, sluice, tmp_path: Path) -> None:
    printed = sluice("show", guarded.folder.url, "--json", cwd=tmp_path).stdout
    assert "SECRET4 " in printed
    assert not [number for number in range(4) if f"SECRET{number} " in printed]


def test_a_snapshot_with_a_list_can_be_judged_again_once_the_list_is_named(guarded: Snapshot, world: Path) -> None:
    base = {name: guarded.manifest["recipe"][name] for name in ("stages", "rules", "held_out", "pack")}
    with pytest.raises(ValueError, match="is not there; give its path"):
        load_recipe(base)
    again = load_recipe(base, [f"rules.known_bad.file={world / 'bad.txt'}", "rules.opt_out.domains=[nowhere.example]"])
    options = Options(output="", engine="local", quiet=True, report=False)
    with pytest.raises(ValueError, match="never measured: 1 rows by clip"):
        select(guarded, with_score_rule(again), options)


def with_score_rule(recipe):
    from dataclasses import replace

    from stages.rules import Threshold

    return replace(recipe, rules={**recipe.rules, "score": Threshold(column="clip.score", at_least=-1)})


def test_a_guard_holds_back_models_alone_and_never_a_stage_it_needs(world: Path) -> None:
    (world / "head.safetensors").touch()
    stages = {"safety": {"head": str(world / "head.safetensors")}}
    assert check_flow(load_recipe(recipe_of(world, stages=stages))) == {
        "decode": 0,
        "text": 0,
        "hash": 0,
        "clip": 3,
        "safety": 3,
    }


def test_what_a_safety_rule_drops_or_could_not_judge_is_not_shown(world: Path, tmp_path: Path) -> None:
    """The head calls half of the pictures unsafe; rows dropped before it are not shown either: nobody has looked."""
    torch.manual_seed(0)
    clip = curate(
        load_recipe({**recipe_of(world), "rules": {}}),
        Options(output=str(tmp_path / "first"), engine="local", quiet=True, report=False),
    )
    embeddings = np.array([row["clip.image_embedding"] for row in rows_of(clip, "features")], np.float32)
    direction = embeddings[6] - embeddings[:6].mean(axis=0)
    middle = float(np.median(embeddings @ direction))
    save_file(
        {"0.weight": torch.from_numpy(direction[None] * 100), "0.bias": torch.tensor([-100 * middle])},
        tmp_path / "head.safetensors",
    )
    recipe = {
        "input": {"url": str(world / "00000.tar")},
        "stages": {**STAGES, "safety": {"head": str(tmp_path / "head.safetensors"), "after": ["caption"]}},
        "rules": {
            "caption": {"column": "text.flaw", "is_null": True},
            "clean": {"column": "safety.score", "at_most": 0.5},
        },
        "held_out": {"fraction": 0},
    }
    recipe["stages"]["clip"] = {**STAGES["clip"], "after": ["caption"]}
    snapshot = curate(load_recipe(recipe), Options(output=str(tmp_path / "out"), engine="local", quiet=True))
    rows = rows_of(snapshot)
    kept = {row["index"] for row in rows if row["verdict"] == "kept"}
    assert 3 <= len(kept) <= 8
    assert rows[2]["rule"] == "caption"
    assert colours_on(snapshot_page(snapshot.folder.url)) == kept
    (column,) = [column for column in snapshot.manifest["columns"] if column["name"] == "safety.score"]
    assert column["scale"] == "probability 0..1"


def test_opt_outs_that_a_dataset_carries_are_honoured(tmp_path: Path) -> None:
    """Robots tags and licences as columns of a Parquet table, under the names that datasets give them."""
    rows = [
        ("free to use", None, "CC-BY 4.0"),
        ("a header", ["noimageai", "noarchive"], "cc by 4.0"),
        ("addressed to a bot", ["otherbot: noai"], "cc0"),
        ("all rights reserved", None, "proprietary"),
        ("harmless tags", ["max-snippet"], "CC0"),
    ]
    table = pa.table(
        {
            "caption": [f"{caption} in a field of grass" for caption, _, _ in rows],
            "x_robots_tag": [tags for _, tags, _ in rows],
            "license": [licence for _, _, licence in rows],
        }
    )
    pq.write_table(table, tmp_path / "0.parquet")
    rule = {
        "type": "opt_out",
        "tags": "metadata.robots",
        "licence": "metadata.license",
        "licences": ["cc0", "cc by 4.0"],
    }
    recipe = load_recipe(
        {
            "input": {"url": str(tmp_path / "0.parquet")},
            "stages": {"text": {"type": "text_quality"}},
            "rules": {"opt_out": rule},
            "held_out": {"fraction": 0},
        }
    )
    snapshot = curate(recipe, Options(output=str(tmp_path / "out"), engine="local", quiet=True, report=False))
    with open_ledger(snapshot.folder.url) as ledger:
        reasons = [row["reason"] for row in ledger.rows('SELECT reason FROM ledger ORDER BY "index"')]
    assert reasons == [None, "opt-out: noimageai", "opt-out: noai", "opt-out: licence proprietary", None]
