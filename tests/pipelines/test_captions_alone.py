"""Captions without pictures: judged by stages that need none, failed by the first stage that needs one."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.recipe import load_recipe
from pipelines.report.pages import snapshot_page
from pipelines.runner import Options, curate
from tests.pipelines.report.reading import assert_inert

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = [
    "a brown dog runs across the meadow",
    "IMG_2031.jpg",
    "ein brauner Hund läuft über die Wiese hinter dem Haus",
    *(f"stock photo {n}" for n in range(12)),
    None,
    "<script>alert(1)</script> on a page",
]


def judged(folder: Path, recipe: dict) -> tuple[list[dict], Path]:
    pq.write_table(pa.table({"TEXT": pa.array(CAPTIONS, pa.string())}), folder / "captions.parquet")
    recipe = {**recipe, "input": {"url": str(folder / "captions.parquet")}}
    snapshot = curate(load_recipe(recipe), Options(output=str(folder / "out"), engine="local", quiet=True))
    rows = [row for table in snapshot.tables("ledger") for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["index"]), Path(snapshot.folder.url)


def test_a_recipe_of_text_measures_judges_captions_alone(tmp_path: Path) -> None:
    import yaml

    recipe = yaml.safe_load((ROOT / "configs" / "alt_text.yaml").read_text())
    rows, snapshot = judged(tmp_path, recipe)
    assert [row["verdict"] for row in rows] == ["kept", *["rejected"] * 16]
    assert rows[1]["reason"] == "text.flaw: file name"
    assert rows[2]["reason"].startswith("language.code 'de' is none of en")
    assert rows[-2]["reason"] == "text.flaw: missing"
    with tarfile.open(snapshot / "shards" / "000000.tar") as archive:
        assert [Path(name).suffix for name in archive.getnames()] == [".txt", ".json"]
    page = assert_inert(snapshot_page(str(snapshot)))
    titles = [title.text.strip() for title in page.all("div", class_="strip-title")]
    assert "✕ text.flaw: boilerplate: 12 rows, 10 shown" in titles, titles
    assert "✕ text.flaw: html: 1 row, 1 shown" in titles


def test_a_stage_that_needs_a_picture_fails_a_row_without_one(tmp_path: Path) -> None:
    rows, _ = judged(tmp_path, {"stages": {"text": {"type": "text_quality"}, "decode": {}}})
    assert {(row["verdict"], row["stage"], row["reason"]) for row in rows} == {("failed", "decode", "no image bytes")}
    assert [row["text.words"] for row in rows][:2] == [7, 3]


def test_real_alt_texts_all_get_a_verdict_and_every_dropped_one_a_reason(shared_data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        ROOT / "configs" / "alt_text.yaml", [f"input.url={shared_data / 'alt_text' / 'alt_text_1000.parquet'}"]
    )
    snapshot = curate(recipe, Options(output=str(tmp_path / "out"), engine="local", quiet=True))
    rows = [row for table in snapshot.tables("ledger") for row in table.to_pylist()]
    assert len(rows) == 1000
    assert all(row["verdict"] in ("kept", "rejected") for row in rows)
    assert all(row["reason"] for row in rows if row["verdict"] == "rejected")
    assert 750 < sum(row["verdict"] == "kept" for row in rows) < 900
