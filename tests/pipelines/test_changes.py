"""What is done again, and only that: the plan says it beforehand, and the files written afterwards agree."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipelines.recipe as recipe_module
from cluster.engine import LocalEngine
from cluster.storage import Folder
from pipelines.changes import changes
from pipelines.recipe import load_recipe
from pipelines.runner import Options, curate, describe_plan, plan_run
from stages.hashing import PerceptualHash
from tests.pipelines import raw

GATED = {
    **raw.RECIPE,
    "stages": {**raw.RECIPE["stages"], "probe": {"type": "probe", "after": ["caption"]}},
    "rules": {**raw.RECIPE["rules"], "bright": {"column": "probe.score", "at_least": 100}},
}
KINDS = {"decode": "decode", "text": "text_quality", "hash": "perceptual_hash", "probe": "probe"}


@pytest.fixture(autouse=True)
def probe_stage(monkeypatch):
    monkeypatch.setitem(recipe_module.STAGE_TYPES, "probe", "tests.pipelines.probe:Probe")


def options_for(folder: Path, **more) -> Options:
    return Options(output=str(folder), engine="local", quiet=True, report=False, **more)


def units(folder: Path) -> dict[str, set[tuple[str, int]]]:
    """The unit files of each stage, with their times."""
    return {
        name: {(str(path), path.stat().st_mtime_ns) for path in folder.glob(f"units/{kind}-*/*.parquet")}
        for name, kind in KINDS.items()
    }


def ledger(snapshot) -> dict[str, dict]:
    return {row["key"]: row for table in snapshot.tables("ledger") for row in table.to_pylist()}


@pytest.fixture
def done(tmp_path):
    """A finished run over three shards: its folder and input."""
    url = raw.write_world(tmp_path / "raw")
    curate(load_recipe({**GATED, "input": {"url": url}}), options_for(tmp_path / "out"))
    return tmp_path / "out", url


def planned_and_done(folder: Path, url: str, overrides=()):
    """What the plan says is done again, what its page says, and which units a run then writes."""
    recipe = load_recipe({**GATED, "input": {"url": url}}, overrides)
    options, store = options_for(folder), Folder(str(folder))
    plan = plan_run(recipe, options, store, LocalEngine())
    found, page = changes(plan, store), describe_plan(plan, store)
    before = units(folder)
    curate(recipe, options)
    after = units(folder)
    assert all(before[name] <= after[name] for name in KINDS), "a unit that was there was written again"
    written = {name: len(after[name] - before[name]) for name in KINDS if after[name] - before[name]}
    said = {change.name: len(change.shards) for change in found if change.what == "stage"}
    return found, page, said, written


def test_nothing_changed_is_nothing_done(done):
    found, page, said, written = planned_and_done(*done)
    assert found == []
    assert "again     nothing" in page
    assert (said, written) == ({}, {})


def test_a_threshold_behind_all_stages_is_judged_again_and_measures_nothing(done):
    found, page, said, written = planned_and_done(*done, ["rules.bright.at_least=120"])
    assert [(change.what, change.why) for change in found] == [
        ("judge", ("rule bright: at_least is 120.0, was 100.0",))
    ]
    assert "again     judge: all 3 shards; rule bright: at_least is 120.0, was 100.0" in page
    assert (said, written) == ({}, {})


def test_a_threshold_before_a_gate_measures_what_comes_through_it(done):
    found, page, said, written = planned_and_done(*done, ["rules.short_side.at_least=4"])
    assert [(change.what, change.name) for change in found] == [("stage", "probe"), ("judge", "")]
    assert found[0].why == ("the rules that it comes after have changed",)
    assert "rows that its gate lets through" in page
    assert said == written == {"probe": 3}


def test_a_stage_redoes_itself_and_what_looks_behind_it(done):
    found, page, said, written = planned_and_done(*done, ["stages.decode.max_pixels=1000000"])
    assert said["decode"] == 3
    assert "decode: max_pixels is 1000000, was 100000000" in page
    gate = next(change for change in found if change.name == "probe")
    assert gate.after_gate
    assert "rule short_side, which it comes after, looks at decode, which is measured again" in gate.why
    # The same rows pass the gate, so the probe's units are found although its rules were judged again.
    assert written == {"decode": 3}


def test_a_new_version_of_a_stage_is_told_and_done(done, monkeypatch):
    monkeypatch.setattr(PerceptualHash, "version", PerceptualHash.version + 1)
    _, page, said, written = planned_and_done(*done)
    assert said == written == {"hash": 3}
    assert f"hash is version {PerceptualHash.version}, was {PerceptualHash.version - 1}" in page


def test_other_weights_are_told_and_redo_the_model_and_what_needs_it(tmp_path):
    from pipelines.plan import Plan

    url = raw.write_world(tmp_path / "raw", shards=1)
    recipe = load_recipe({**raw.RECIPE, "input": {"url": url}})
    curate(recipe, options_for(tmp_path / "out"))
    store = Folder(str(tmp_path / "out"))
    plan = plan_run(recipe, options_for(tmp_path / "out"), store, LocalEngine())
    assert isinstance(plan, Plan)
    plan.models["hash"] = {"digest": "f" * 32, "files": {}}
    plan.stage_keys["hash"] = "e" * 32
    (hashed, judged) = changes(plan, store)
    assert hashed.why == ("hash has other weights: ffffffffffff, was None",)
    assert judged.why == ("stage hash is measured again",)


def test_one_changed_input_shard_is_measured_alone(done):
    folder, url = done
    path = folder.parent / "raw" / "00001.tar"
    raw.write_tar(path, raw.sample("000000000", raw.jpeg(raw.picture(555)), "a photo that is new"))
    _, page, said, written = planned_and_done(folder, url)
    assert said == written == {"decode": 1, "text": 1, "hash": 1, "probe": 1}
    assert "1 of 3 shards (00001.tar); input 00001.tar has changed" in page


def test_a_new_and_a_lost_input_shard_are_told(done):
    folder, _ = done
    (folder.parent / "raw" / "00001.tar").unlink()
    found, page, said, written = planned_and_done(folder, str(folder.parent / "raw"))
    assert (said, written) == ({}, {})
    assert found[0].why == ("1 input shards are no longer there",)
    raw.write_tar(folder.parent / "raw" / "00007.tar", raw.sample("7", raw.jpeg(raw.picture(7777)), "a photo of it"))
    _, page, said, written = planned_and_done(folder, str(folder.parent / "raw"))
    assert said == written == {"decode": 1, "text": 1, "hash": 1, "probe": 1}
    assert "input 00007.tar is new" in page


def test_other_bounds_of_tars_pack_again_and_measure_nothing(done):
    found, page, said, written = planned_and_done(*done, ["pack.shard_samples=4"])
    assert [change.what for change in found] == ["pack"]
    assert "again     pack: all 3 shards; pack: shard_samples is 4, was 0" in page
    assert (said, written) == ({}, {})


def test_the_first_run_does_everything(tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=2)
    _, page, said, written = planned_and_done(tmp_path / "out", url)
    assert said == written == dict.fromkeys(KINDS, 2)
    assert "the first run" in page


# --- failed rows -----------------------------------------------------------------------------------------------------


def batches(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_failed_rows_alone_are_taken_up_again(tmp_path, monkeypatch):
    url = raw.write_world(tmp_path / "raw", shards=2, rows=12)
    recipe = load_recipe({**GATED, "input": {"url": url}})
    monkeypatch.setenv("SLUICE_PROBE_FAIL", "number 3")
    failed = curate(recipe, options_for(tmp_path / "out"))
    assert ledger(failed)["000000003"]["reason"] == "asked to fail"
    log = tmp_path / "log"
    monkeypatch.setenv("SLUICE_PROBE_LOG", str(log))
    # The same command again does not try again, and says nothing else.
    assert curate(recipe, options_for(tmp_path / "out")).id == failed.id
    assert batches(log) == []
    monkeypatch.delenv("SLUICE_PROBE_FAIL")
    before = units(tmp_path / "out")
    retried = curate(recipe, options_for(tmp_path / "out", retry_failed=True))
    assert batches(log) == [1]
    assert ledger(retried)["000000003"]["verdict"] == "kept"
    after = units(tmp_path / "out")
    # Each shard has a picture that breaks off, which decode and hash try once more.
    written = {name: len(after[name] - before[name]) for name in KINDS}
    assert written == {"decode": 2, "text": 0, "hash": 2, "probe": 1}
    others = [key for key in ledger(failed) if key != "000000003"]
    assert all(ledger(retried)[key] == {**ledger(failed)[key], **_moved(ledger(retried)[key])} for key in others)
    # From now on this is what is known.
    log.unlink()
    assert curate(recipe, options_for(tmp_path / "out")).id == retried.id
    assert batches(log) == []


def _moved(row: dict) -> dict:
    """A sample's place in its tar, which one more kept row before it moves."""
    return {name: row[name] for name in ("output_shard", "output_key")}


def test_a_row_that_fails_again_stays_failed_and_can_be_tried_once_more(tmp_path, monkeypatch):
    url = raw.write_world(tmp_path / "raw", shards=1)
    recipe = load_recipe({**GATED, "input": {"url": url}})
    monkeypatch.setenv("SLUICE_PROBE_FAIL", "number 3")
    failed = curate(recipe, options_for(tmp_path / "out"))
    assert curate(recipe, options_for(tmp_path / "out", retry_failed=True)).id == failed.id
    monkeypatch.delenv("SLUICE_PROBE_FAIL")
    retried = curate(recipe, options_for(tmp_path / "out", retry_failed=True))
    assert ledger(retried)["000000003"]["verdict"] == "kept"


def test_a_row_taken_up_goes_on_to_the_stages_behind_the_gate_alone(tmp_path, monkeypatch):
    """Two probes: the first fails a row, so the second never sees it; taken up, it is all that the second measures."""
    stages = {**raw.RECIPE["stages"], "first": {"type": "probe"}, "second": {"type": "probe", "after": ["bright"]}}
    rules = {"bright": {"column": "first.score", "at_least": 0}, "dark": {"column": "second.score", "at_least": 0}}
    url = raw.write_world(tmp_path / "raw", shards=1)
    recipe = load_recipe({"stages": stages, "rules": rules, "input": {"url": url}})
    monkeypatch.setenv("SLUICE_PROBE_FAIL", "number 3")
    failed = curate(recipe, options_for(tmp_path / "out"))
    assert ledger(failed)["000000003"]["second.error"] == "not_measured(first)"
    monkeypatch.delenv("SLUICE_PROBE_FAIL")
    monkeypatch.setenv("SLUICE_PROBE_LOG", str(tmp_path / "log"))
    retried = curate(recipe, options_for(tmp_path / "out", retry_failed=True))
    assert batches(tmp_path / "log") == [1, 1]
    assert ledger(retried)["000000003"]["second.score"] is not None
