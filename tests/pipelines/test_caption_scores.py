"""Captions' scores from the recipe to the captions table and the report."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from pipelines.recipe import load_recipe
from pipelines.report.pages import snapshot_page
from pipelines.report.telling import auc
from pipelines.runner import Options, curate
from tests.pipelines import raw
from tests.pipelines.report.reading import assert_inert

SCENES = ("a red circle left of a blue square", "a green triangle above a red square", "a blue circle")
RECIPE = {
    "stages": {
        "clip": {"type": "clip_score", "model": "clip", "compute_batch": 16},
        "others": {"type": "caption_scores", "model": "clip", "compute_batch": 16},
        "probe": {"type": "caption_probe", "model": "clip", "compute_batch": 16},
    },
    "held_out": {"fraction": 0},
}


def test_scores_reach_the_captions_table_and_the_report(tmp_path: Path) -> None:
    members = []
    for number, scene in enumerate(SCENES):
        more = json.dumps({"captions": [f"{scene}, drawn", "two squares"]}).encode()
        data = raw.jpeg(raw.picture(number))
        members += [(f"{number}.jpg", data), (f"{number}.txt", scene.encode()), (f"{number}.json", more)]
    raw.write_tar(tmp_path / "00000.tar", members)
    with tarfile.open(tmp_path / "00000.tar") as archive:
        assert len(archive.getnames()) == 9
    recipe = load_recipe({**RECIPE, "input": {"url": str(tmp_path / "00000.tar")}})
    snapshot = curate(recipe, Options(output=str(tmp_path / "out"), engine="local", quiet=True))
    captions = [row for table in snapshot.tables("captions") for row in table.to_pylist()]
    assert len(captions) == 9
    assert all(row["clip_score"] is not None and row["token_count"] > 2 for row in captions)
    ledger = {row["uid"]: row for table in snapshot.tables("ledger") for row in table.to_pylist()}
    for row in captions:
        if row["source"] == "original":
            assert row["clip_score"] == ledger[row["uid"]]["clip.score"]
            assert ledger[row["uid"]]["probe.caption"] == pytest.approx(row["clip_score"], abs=5e-4)
    named = {column["name"]: column for column in snapshot.manifest["columns"]}
    for name in ("clip.score", "others.scores"):
        assert named[name]["model"] == "clip"
        assert len(named[name]["model_digest"]) == 32
    page = assert_inert(snapshot_page(snapshot.folder.url))
    lines = [line for line in page.all("tr") if "data-wrong" in line.attributes]
    counted = {line.attributes["data-wrong"]: line.all("td")[2].text for line in lines}
    assert counted == {"another row's caption": "3", "two attributes exchanged": "2", "the relation reversed": "2"}


def test_auc_is_the_mann_whitney_statistic_and_nothing_without_values() -> None:
    import numpy as np
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    higher, lower = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    expected = mannwhitneyu(higher, lower).statistic / (40 * 30)
    assert auc(list(higher), list(lower)) == pytest.approx(expected)
    assert np.isnan(auc([], [1.0]))
