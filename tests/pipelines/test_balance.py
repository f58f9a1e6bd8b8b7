"""Balancing in a run: each row's cluster in the ledger, what came of it in the manifest and on the page."""

from __future__ import annotations

from pathlib import Path

from pipelines.recipe import load_recipe
from pipelines.report.pages import snapshot_page
from pipelines.runner import Options, curate
from tests.pipelines import raw
from tests.pipelines.report.reading import assert_inert


def test_every_row_that_was_clustered_says_which_cluster_it_is_in(tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for row in range(8):
            number = 10 * shard + row
            data = b"no picture" if row == 0 else raw.jpeg(raw.picture(number))
            members += raw.sample(f"{number:03d}", data, raw.CAPTION.format(number))
        raw.write_tar(tmp_path / "raw" / f"{shard:05d}.tar", members)
    recipe = {
        "input": {"url": str(tmp_path / "raw")},
        "stages": {"clip": {"type": "clip_score", "model": "clip", "compute_batch": 16}},
        "rules": {"balance": {"type": "balance", "clusters": 3, "max_share": 0.2}},
        "held_out": {"fraction": 0},
    }
    snapshot = curate(load_recipe(recipe), Options(output=str(tmp_path / "out"), engine="local", quiet=True))
    rows = [row for table in snapshot.tables("ledger") for row in table.to_pylist()]
    assert len(rows) == 16
    by_cluster: dict[int, list[str]] = {}
    for row in rows:
        assert (row["balance.cluster"] is None) == (row["verdict"] == "failed")
        if row["verdict"] != "failed":
            by_cluster.setdefault(row["balance.cluster"], []).append(row["verdict"])
    # 14 rows alive: a fifth of them is two.
    assert {verdicts.count("kept") for verdicts in by_cluster.values()} <= {1, 2}
    cut = snapshot.manifest["cuts"]["balance"]
    assert cut["clusters"] == len(by_cluster) > 1
    assert cut["largest_before"] == max(map(len, by_cluster.values()))
    assert cut["effective_after"] >= cut["effective_before"] > 1
    page = assert_inert(snapshot_page(snapshot.folder.url))
    assert any("By concept cluster" in title.text for title in page.all("h3"))
