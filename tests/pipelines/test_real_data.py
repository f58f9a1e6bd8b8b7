"""Curation of real photographs, where they are at hand: known duplicates, and files nobody made on purpose."""

import tarfile
from pathlib import Path

from pipelines.recipe import load_recipe
from pipelines.runner import Options, curate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def curated(url: str, folder: Path):
    recipe = load_recipe(CONFIGS / "dedupe.yaml", [f"input.url='{url}'"])
    snapshot = curate(recipe, Options(output=str(folder), engine="local", quiet=True, report=False))
    return snapshot, [row for table in snapshot.tables("ledger") for row in table.to_pylist()]


def test_each_pair_of_photographs_leaves_exactly_the_original_and_nothing_else_is_dropped(shared_data, tmp_path):
    _, rows = curated(f"{shared_data}/flickr8k/{{00000..00003}}.tar", tmp_path / "out")
    lines = (shared_data / "flickr8k" / "near_dup_pairs.tsv").read_text().splitlines()[1:]
    pairs = [tuple(line.split("\t")) for line in lines]
    assert len(rows) == 640
    by_key = {row["key"]: row for row in rows}
    dropped = {key for key, row in by_key.items() if row["verdict"] != "kept"}
    assert dropped == {copy for _, copy in pairs}
    assert all(by_key[copy]["keeper_uid"] == by_key[original]["uid"] for original, copy in pairs)


def test_odd_files_are_each_kept_or_have_a_reason(shared_data, tmp_path):
    files = sorted((shared_data / "odd_files").iterdir())
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        for path in files:
            archive.add(path, arcname=path.name)
    _, rows = curated(str(tmp_path / "odd.tar"), tmp_path / "out")
    assert {row["member"] for row in rows} == {path.name for path in files}
    failed = {row["member"]: row["reason"] for row in rows if row["verdict"] == "failed"}
    assert failed.keys() == {"LICENSE", "ukbench09268_corrupt.jpg"}
    assert all(row["reason"] for row in rows if row["verdict"] != "kept")
