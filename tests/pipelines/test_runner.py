"""The runner on small real inputs: one snapshot whatever the engine, batches or kills; only what must is redone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import pipelines.recipe as recipe_module
from cluster.storage import LeaseHeldError
from pipelines.recipe import RecipeError, load_recipe
from pipelines.runner import Options, curate, select
from pipelines.snapshot import open_snapshot
from tests.pipelines import raw


@pytest.fixture(autouse=True)
def probe_stage(monkeypatch):
    """The probe is a stage for these tests, also in Ray's workers, which find nothing in the working directory."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setitem(recipe_module.STAGE_TYPES, "probe", "tests.pipelines.probe:Probe")


def run(folder: Path, url: str, recipe=raw.RECIPE, engine="local", overrides=(), **options):
    loaded = load_recipe({**recipe, "input": {"url": url}}, overrides)
    return curate(loaded, Options(output=str(folder), engine=engine, quiet=True, report=False, **options))


def ledger(snapshot) -> list[dict]:
    return [row for table in snapshot.tables("ledger") for row in table.to_pylist()]


def by_key(snapshot) -> dict[str, dict]:
    return {row["key"]: row for row in ledger(snapshot)}


def content(snapshot) -> dict[str, bytes]:
    """Every file of a snapshot but the one that names times and places."""
    root = Path(snapshot.folder.url)
    names = [path for path in root.rglob("*") if path.is_file() and path.name not in ("provenance.json", "report.html")]
    return {str(path.relative_to(root)): path.read_bytes() for path in names}


def units(folder: Path, kind: str) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob(f"units/{kind}-*/*.parquet")}


GATED = {
    **raw.RECIPE,
    "stages": {**raw.RECIPE["stages"], "probe": {"type": "probe", "after": ["near"]}},
    "rules": {**raw.RECIPE["rules"], "bright": {"column": "probe.score", "at_least": 100}},
}


def test_every_row_gets_the_verdict_it_was_planted_for(tmp_path):
    snapshot = run(tmp_path / "out", raw.write_world(tmp_path / "raw"))
    rows = by_key(snapshot)
    assert len(rows) == 45
    for shard in range(3):
        first = shard * 1000
        story = {n: (rows[f"{first + n:09d}"]["verdict"], rows[f"{first + n:09d}"]["rule"]) for n in range(900, 905)}
        assert story == {
            900: ("rejected", "exact"),
            901: ("rejected", "near"),
            902: ("rejected", "short_side"),
            903: ("failed", None),
            904: ("rejected", "caption"),
        }
        assert all(rows[f"{first + n:09d}"]["verdict"] == "kept" for n in range(10))
        assert rows[f"{first + 901:09d}"]["keeper_uid"] == rows[f"{first + 1:09d}"]["uid"]
        assert "truncated" in rows[f"{first + 903:09d}"]["reason"]
    funnel = snapshot.manifest["funnel"]
    assert funnel["rows_in"] == funnel["kept"] + funnel["rejected"] + funnel["failed"] == 45
    assert [step["rejected"] for step in funnel["steps"]] == [3, 3, 3, 3]


def test_kept_samples_keep_their_bytes_and_read_as_a_webdataset(tmp_path):
    import webdataset

    snapshot = run(tmp_path / "out", raw.write_world(tmp_path / "raw", shards=1))
    rows = {row["output_key"]: row for row in ledger(snapshot) if row["verdict"] == "kept"}
    path = f"{snapshot.folder.url}/shards/000000.tar"
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(path, shardshuffle=False)}
    assert samples.keys() == rows.keys()
    for key, sample in samples.items():
        number = int(rows[key]["key"])
        assert sample["jpg"] == raw.jpeg(raw.picture(number))
        assert sample["txt"].decode() == raw.CAPTION.format(number)
        assert json.loads(sample["json"])["uid"] == rows[key]["uid"]


def test_rows_name_every_rule_they_fail_and_the_first_that_failed(tmp_path):
    members = raw.sample("a", raw.jpeg(raw.picture(1, (16, 16))), "IMG_1234.jpg")
    raw.write_tar(tmp_path / "raw" / "0.tar", members)
    row = ledger(run(tmp_path / "out", str(tmp_path / "raw")))[0]
    assert (row["rule"], row["failed_rules"], row["value"], row["threshold"]) == (
        "short_side",
        ["short_side", "caption"],
        16,
        32,
    )


def test_one_snapshot_whatever_the_transport_batch(tmp_path):
    url = raw.write_world(tmp_path / "raw")
    ids = {
        run(tmp_path / f"out{size}", url, GATED, overrides=[f"engine.transport_batch={size}"]).id
        for size in (1, 7, 500)
    }
    assert len(ids) == 1


def test_a_model_stage_sees_gated_rows_in_batches_of_its_own(tmp_path):
    snapshot = run(tmp_path / "out", raw.write_world(tmp_path / "raw", shards=1, rows=20), GATED)
    rows = ledger(snapshot)
    measured = [row for row in rows if row["probe.batch"] is not None]
    assert [row["probe.batch"] for row in measured] == [16] * 16 + [4] * 4
    gates = {row["key"][-3:]: row["probe.error"] for row in rows if row["probe.batch"] is None}
    assert gates == {
        "900": "not_measured(exact)",
        "901": "not_measured(near)",
        "902": "not_measured(short_side)",
        "903": "not_measured(decode)",
        "904": "not_measured(caption)",
    }


def test_a_stage_that_cannot_measure_a_row_fails_that_row_alone(tmp_path):
    recipe = {
        **GATED,
        "stages": {**GATED["stages"], "probe": {"type": "probe", "after": ["near"], "fail_on": "number 3"}},
    }
    rows = by_key(run(tmp_path / "out", raw.write_world(tmp_path / "raw", shards=1), recipe))
    failed = [key for key, row in rows.items() if row["stage"] == "probe" and row["verdict"] == "failed"]
    assert failed == ["000000003"]
    assert rows["000000003"]["reason"] == "asked to fail"


def test_the_same_command_again_measures_nothing(tmp_path, monkeypatch):
    url = raw.write_world(tmp_path / "raw")
    first = run(tmp_path / "out", url, GATED)
    monkeypatch.setenv("SLUICE_PROBE_LOG", str(tmp_path / "log"))
    before = content(first)
    again = run(tmp_path / "out", url, GATED)
    assert again.id == first.id
    assert content(again) == before
    assert not (tmp_path / "log").exists()


def test_a_changed_stage_redoes_that_stage_alone(tmp_path):
    url = raw.write_world(tmp_path / "raw")
    run(tmp_path / "out", url)
    hashes = units(tmp_path / "out", "perceptual_hash")
    run(tmp_path / "out", url, overrides=["stages.decode.max_pixels=1000000"])
    assert units(tmp_path / "out", "perceptual_hash") == hashes
    assert len(units(tmp_path / "out", "decode")) == 6


def test_a_changed_input_shard_redoes_that_shard_alone_and_rewrites_one_tar(tmp_path):
    url = raw.write_world(tmp_path / "raw")
    first = run(tmp_path / "out", url)
    before = units(tmp_path / "out", "decode")
    raw.write_tar(tmp_path / "raw" / "00001.tar", raw.sample("n", raw.jpeg(raw.picture(77)), "a new photo of it"))
    second = run(tmp_path / "out", url)
    after = units(tmp_path / "out", "decode")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    digests = [[shard["digest"] for shard in snapshot.manifest["shards"]] for snapshot in (first, second)]
    assert [old == new for old, new in zip(*digests, strict=True)] == [True, False, True]


def test_the_name_and_place_of_the_input_do_not_change_the_snapshot(tmp_path):
    first = run(tmp_path / "out", raw.write_world(tmp_path / "raw"))
    (tmp_path / "raw").rename(tmp_path / "moved")
    second = run(tmp_path / "elsewhere", str(tmp_path / "moved" / "*.tar"))
    assert first.id == second.id
    assert content(first) == content(second)


def test_ray_gives_the_snapshot_of_one_process(tmp_path, ray_temp):
    url = raw.write_world(tmp_path / "raw")
    local = run(tmp_path / "local", url)
    on_ray = run(tmp_path / "ray", url, engine="ray", workers=2)
    assert on_ray.id == local.id
    assert content(on_ray) == content(local)


def test_select_judges_again_without_measuring_and_equals_a_fresh_run(tmp_path, monkeypatch):
    url = raw.write_world(tmp_path / "raw")
    source = run(tmp_path / "out", url, GATED)
    monkeypatch.setenv("SLUICE_PROBE_LOG", str(tmp_path / "log"))
    base = {name: source.manifest["recipe"][name] for name in ("stages", "rules", "held_out", "pack")}
    options = Options(output="", engine="local", quiet=True, report=False, parents=(source.folder.url,))
    stricter = select(source, load_recipe(base, ["rules.bright.at_least=125"]), options)
    assert not (tmp_path / "log").exists()
    assert 0 < stricter.manifest["funnel"]["kept"] < source.manifest["funnel"]["kept"]
    assert stricter.manifest["parents"] == [source.id]
    fresh = run(tmp_path / "fresh", url, GATED, overrides=["rules.bright.at_least=125"])
    assert fresh.id == stricter.id


def test_select_refuses_to_revive_rows_that_were_never_measured_unless_told_to_measure(tmp_path):
    url = raw.write_world(tmp_path / "raw")
    source = run(tmp_path / "out", url, GATED)
    base = {name: source.manifest["recipe"][name] for name in ("stages", "rules", "held_out", "pack")}
    options = Options(output="", engine="local", quiet=True, report=False, parents=(source.folder.url,))
    looser = load_recipe(base, ["rules.short_side.at_least=4"])
    with pytest.raises(RecipeError, match=r"3 rows by probe .*--measure-missing"):
        select(source, looser, options)
    revived = select(source, looser, options, measure_missing=True)
    assert by_key(revived)["000000902"]["probe.score"] is not None
    fresh = run(tmp_path / "fresh", url, GATED, overrides=["rules.short_side.at_least=4"])
    assert fresh.id == revived.id


def test_select_says_what_to_do_where_other_readers_read_the_rows(tmp_path, monkeypatch):
    source = run(tmp_path / "out", raw.write_world(tmp_path / "raw"), GATED)
    base = {name: source.manifest["recipe"][name] for name in ("stages", "rules", "held_out", "pack")}
    monkeypatch.setattr("pipelines.plan.READER_VERSION", 10**6)
    with pytest.raises(RecipeError, match="another version of Sluice's readers: run sluice curate again"):
        select(source, load_recipe(base), Options(output="", engine="local", quiet=True, report=False))


def test_held_out_rows_are_whole_duplicate_groups_and_a_child_inherits_them(tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=4)
    parent = run(tmp_path / "out", url)
    sides = parent.sides()
    assert {"train", "held_out"} == set(sides.values())
    for row in ledger(parent):
        if row["rule"] in ("exact", "near"):
            keeper = next(other for other in ledger(parent) if other["uid"] == row["keeper_uid"])
            assert row["split"] == keeper["split"]
    # Another seed draws other sides; a child keeps its parent's all the same.
    other = run(tmp_path / "other", url, overrides=["held_out.seed=5"])
    assert other.sides() != sides
    child = run(tmp_path / "child", url, overrides=["held_out.seed=5"], parents=(parent.folder.url,))
    assert child.sides() == sides


def test_a_damaged_tail_yields_the_good_rows_and_one_that_stands_for_the_rest(tmp_path):
    raw.write_world(tmp_path / "raw", shards=1)
    path = tmp_path / "raw" / "00000.tar"
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[12].offset_data
    path.write_bytes(path.read_bytes()[: offset + 100])
    rows = ledger(run(tmp_path / "out", str(path)))
    assert [row["verdict"] for row in rows].count("kept") == 4
    assert rows[-1]["verdict"] == "failed"
    assert rows[-1]["reason"].startswith("damaged tar")


def test_a_limit_reads_that_many_rows_spread_over_the_shards(tmp_path):
    snapshot = run(tmp_path / "out", raw.write_world(tmp_path / "raw"), limit=7)
    assert snapshot.manifest["funnel"]["rows_in"] == 7
    assert len(snapshot.manifest["inputs"]) == 3


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=1)
    script = (
        "import sys, time\nfrom cluster.storage import Folder, lease\n"
        "with lease(Folder(sys.argv[1]), 'another run'):\n print('held', flush=True)\n time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(LeaseHeldError, match="another run"):
        run(tmp_path / "out", url)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run(tmp_path / "out", url).manifest["funnel"]["rows_in"] == 15


def kill_in_the_middle(command: list[str], folder: Path, finished: str, count: int, environment) -> bool:
    """Start `command`, kill it as soon as `count` files match `finished`. True if it was killed before its end."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(6000):
            if process.poll() is not None:
                return False
            if len(list(folder.glob(finished))) >= count:
                return True
            time.sleep(0.01)
        return False
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.full)])
def test_a_killed_driver_started_again_ends_byte_identical(tmp_path, engine, ray_temp):
    url = raw.write_world(tmp_path / "raw", shards=8, rows=60)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**raw.RECIPE, "input": {"url": url}}))
    whole = run(tmp_path / "whole", url)
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "curate", str(recipe), "--output"]
    command += [str(tmp_path / "killed"), *(["--local"] if engine == "local" else ["--workers", "2"])]
    assert kill_in_the_middle(command, tmp_path / "killed", "units/decode-*/*.parquet", 3, dict(os.environ))
    assert not list((tmp_path / "killed").glob("snapshots/*/manifest.json"))
    before = units(tmp_path / "killed", "decode")
    subprocess.run(command, check=True, env=dict(os.environ), capture_output=True)
    again = open_snapshot(str(tmp_path / "killed"))
    assert content(again) == content(whole)
    assert before.items() <= units(tmp_path / "killed", "decode").items()


def test_parquet_and_folders_are_read_like_tars(tmp_path):
    import pyarrow as pa

    pictures = [raw.jpeg(raw.picture(number)) for number in range(5)]
    captions = [raw.CAPTION.format(number) for number in range(5)]
    pq.write_table(pa.table({"image": pictures, "TEXT": captions, "key": list("abcde")}), tmp_path / "part.parquet")
    structs = [{"bytes": data, "path": None} for data in pictures]
    pq.write_table(pa.table({"image": structs, "text": captions}), tmp_path / "struct.parquet")
    (tmp_path / "folder").mkdir()
    for number, (data, caption) in enumerate(zip(pictures, captions, strict=True)):
        (tmp_path / "folder" / f"{number}.jpg").write_bytes(data)
        (tmp_path / "folder" / f"{number}.txt").write_text(caption)
    raw.write_tar(
        tmp_path / "five.tar",
        [member for n in range(5) for member in raw.sample(f"{n:09d}", pictures[n], captions[n])],
    )
    found = [
        {row["uid"] for row in ledger(run(tmp_path / f"out{n}", str(tmp_path / name))) if row["verdict"] == "kept"}
        for n, name in enumerate(("part.parquet", "struct.parquet", "folder", "five.tar"))
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert len(found[0]) == 5


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("transport", [7, 500])
def test_one_snapshot_over_engines_workers_and_transport(tmp_path, workers, transport, ray_temp):
    url = raw.write_world(tmp_path / "raw", rows=40)
    local = run(tmp_path / "local", url, GATED)
    overrides = [f"engine.transport_batch={transport}"]
    on_ray = run(tmp_path / "ray", url, GATED, engine="ray", workers=workers, overrides=overrides)
    assert content(on_ray) == content(local)
