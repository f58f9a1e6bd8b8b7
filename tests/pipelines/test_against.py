"""A run held against earlier snapshots and benchmarks: each drop names its keeper there, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipe import RecipeError, load_recipe
from pipelines.runner import Options, curate, select
from pipelines.snapshot import open_snapshot
from tests.pipelines import raw


def run(folder: Path, url: str, recipe=raw.RECIPE, overrides=(), **options):
    loaded = load_recipe({**recipe, "input": {"url": url}}, overrides)
    return curate(loaded, Options(output=str(folder), engine="local", quiet=True, report=False, **options))


def rows(snapshot) -> dict[str, dict]:
    return {row["key"]: row for table in snapshot.tables("ledger") for row in table.to_pylist()}


@pytest.fixture
def earlier(tmp_path):
    return run(tmp_path / "earlier", raw.write_world(tmp_path / "old", shards=2))


@pytest.fixture
def crawl(tmp_path) -> str:
    """A new crawl: one picture again byte for byte, one saved again, one enlarged, two that are new."""
    copy = raw.picture(1002)
    members = raw.sample("same", raw.jpeg(raw.picture(2)), "a photo of the same bytes")
    members += raw.sample("again", raw.jpeg(copy, 55), "a photo saved again")
    members += raw.sample("larger", raw.jpeg(raw.picture(3).resize((96, 80))), "a photo made larger")
    members += raw.sample("new", raw.jpeg(raw.picture(70)), "a photo that is new")
    members += raw.sample("newer", raw.jpeg(raw.picture(71)), "a photo that is newer")
    return str(raw.write_tar(tmp_path / "new" / "0.tar", members))


def test_a_new_crawl_loses_what_an_earlier_snapshot_holds_and_names_the_keeper_there(tmp_path, earlier, crawl):
    found = rows(run(tmp_path / "out", crawl, against=(earlier.folder.url,)))
    held = rows(earlier)
    for key, rule, keeper in (("same", "exact", 2), ("again", "near", 1002), ("larger", "near", 3)):
        assert (found[key]["verdict"], found[key]["rule"]) == ("rejected", rule), key
        assert found[key]["keeper_uid"] == held[f"{keeper:09d}"]["uid"]
        assert found[key]["reason"].endswith(f", in snapshot {earlier.id[:12]}")
    assert [found[key]["verdict"] for key in ("new", "newer")] == ["kept", "kept"]
    assert {row["verdict"] for row in rows(run(tmp_path / "alone", crawl)).values()} == {"kept"}


def test_rejected_rows_of_an_earlier_snapshot_hold_nothing(tmp_path, earlier):
    small = raw.write_tar(tmp_path / "new" / "0.tar", raw.sample("x", raw.jpeg(raw.picture(902)), "a photo of it"))
    assert rows(run(tmp_path / "out", str(small), against=(earlier.folder.url,)))["x"]["verdict"] == "kept"


def test_what_a_run_is_held_against_is_part_of_its_verdicts_and_measures_nothing_again(tmp_path, earlier, crawl):
    alone = run(tmp_path / "out", crawl)
    units = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("units/decode-*/*.parquet")}
    against = run(tmp_path / "out", crawl, against=(earlier.folder.url,))
    assert against.id != alone.id
    assert run(tmp_path / "out", crawl).id == alone.id
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("units/decode-*/*.parquet")} == units


def test_select_goes_on_holding_rows_against_the_same(tmp_path, earlier, crawl):
    source = run(tmp_path / "out", crawl, against=(earlier.folder.url,))
    base = {name: source.manifest["recipe"][name] for name in ("stages", "rules", "held_out", "pack")}
    options = Options(output="", engine="local", quiet=True, report=False, parents=(source.folder.url,))
    chosen = select(source, load_recipe(base, ["rules.near.radius=6"]), options)
    assert rows(chosen)["same"]["keeper_uid"] == rows(earlier)["000000002"]["uid"]


def test_a_snapshot_that_was_measured_otherwise_is_refused(tmp_path, crawl):
    other = run(tmp_path / "other", crawl, overrides=["stages.decode.max_pixels=1000000"])
    with pytest.raises(RecipeError, match=r"its stage 'decode' is .* curate that snapshot again"):
        run(tmp_path / "out", crawl, against=(other.folder.url,))
    plain = {"stages": {"decode": {}}, "rules": {}}
    with pytest.raises(RecipeError, match="needs a rule on duplicates"):
        run(tmp_path / "plain", crawl, plain, against=(open_snapshot(str(tmp_path / "other")).folder.url,))


@pytest.fixture
def benchmark(tmp_path) -> tuple[str, str]:
    """Two benchmarks: a folder with pictures 1002 and 3, and a list of prompts."""
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for number in (1002, 3):
        (folder / f"{number}.jpg").write_bytes(raw.jpeg(raw.picture(number)))
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text("prompt\ttag\nA photo,  that is NEW!\tx\nsomething else\ty\n")
    return str(folder), str(prompts)


@pytest.mark.parametrize("on_match", ["drop", "mark"])
def test_rows_of_a_benchmark_are_dropped_or_kept_and_marked(tmp_path, crawl, benchmark, on_match):
    rule = {"contamination": {"type": "contamination", "on_match": on_match}}
    recipe = {**raw.RECIPE, "rules": {**rule, **raw.RECIPE["rules"]}}
    snapshot = run(tmp_path / "out", crawl, recipe, against=benchmark)
    found = rows(snapshot)
    matched = {key for key, row in found.items() if "contamination" in row["failed_rules"]}
    assert matched == {"again", "larger", "new"}
    verdicts = {found[key]["verdict"] for key in matched}
    assert verdicts == ({"rejected"} if on_match == "drop" else {"kept"})
    assert [found[key]["verdict"] for key in ("same", "newer")] == ["kept", "kept"]
    assert snapshot.manifest["cuts"]["contamination"] == {
        "benchmark_rows": 4,
        "matches": 3,
        "matched_benchmark_rows": 3,
    }
    if on_match == "drop":
        assert found["new"]["reason"] == "the same caption, in benchmark prompts.tsv"
        assert found["again"]["reason"].endswith("bits from its image, in benchmark benchmark")


def test_without_a_rule_of_its_own_a_benchmark_is_dropped_before_duplicates_are_sought(tmp_path, crawl, benchmark):
    snapshot = run(tmp_path / "out", crawl, against=benchmark)
    assert list(snapshot.manifest["recipe"]["rules"]) == ["short_side", "caption", "contamination", "exact", "near"]
    dropped = {key for key, row in rows(snapshot).items() if row["rule"] == "contamination"}
    assert dropped == {"again", "larger", "new"}


def test_prompts_alone_need_no_stage_that_hashes(tmp_path, crawl, benchmark):
    recipe = {"stages": {"decode": {}}, "rules": {}}
    snapshot = run(tmp_path / "out", crawl, recipe, against=(benchmark[1],))
    assert {key for key, row in rows(snapshot).items() if row["verdict"] == "rejected"} == {"new"}


def test_a_changed_benchmark_is_other_verdicts(tmp_path, crawl, benchmark):
    first = run(tmp_path / "out", crawl, against=(benchmark[1],))
    Path(benchmark[1]).write_text("prompt\ta photo\nA photo that is NEWER\tx\n")
    second = run(tmp_path / "out", crawl, against=(benchmark[1],))
    assert (rows(first)["new"]["verdict"], rows(first)["newer"]["verdict"]) == ("rejected", "kept")
    assert (rows(second)["new"]["verdict"], rows(second)["newer"]["verdict"]) == ("kept", "rejected")
