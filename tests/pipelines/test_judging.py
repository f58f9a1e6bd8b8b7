"""Judging by pieces and parts: the same snapshot however the rows are cut, on Ray and in one process, killed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.runner as runner_module
from cluster.engine import LocalEngine
from cluster.storage import Folder
from pipelines import barriers, judging
from pipelines.judge import JudgedShard
from pipelines.judging import Case, JudgeWorker, judge_all
from pipelines.measure import ROWS_SCHEMA
from pipelines.recipe import HeldOut, load_recipe
from pipelines.runner import Options, curate
from pipelines.snapshot import open_snapshot
from stages.dedupe import ExactDuplicates, NearDuplicates
from stages.rules import Threshold, TopFraction
from stages.semantic import SemanticDuplicates
from tests.pipelines import raw

RULES = {
    "large": Threshold(column="decode.pixels", at_least=2),
    "exact": ExactDuplicates(),
    "sharp": Threshold(column="decode.pixels", at_most=9),
    "near": NearDuplicates(radius=4),
    "semantic": SemanticDuplicates(eps=0.05, clusters=4),
    "top": TopFraction(column="decode.pixels", fraction=0.9),
}
STAGES = ("decode", "hash", "clip")


def write_case(folder: Path, seed: int = 0, shards: int = 5, rows: int = 60) -> Case:
    """Rows made of few images, few hashes and few directions, so that every rule drops some; as a measured store."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, 40, dtype=np.uint64)
    looks = [bytes([shade]) * 192 for shade in (30, 90, 91, 200)]
    directions = rng.standard_normal((12, 8))
    listed = []
    for number in range(shards):
        digest = f"{number * 7919 % 97:064x}"
        images = [f"{value:032x}" for value in rng.integers(0, 150, rows)]
        flips = np.uint64(1) << rng.integers(0, 64, rows, dtype=np.uint64)
        hashes = rng.choice(base, rows) ^ np.where(rng.random(rows) < 0.5, flips, np.uint64(0))
        # A caption's part of the uid is random: the same image may come with several.
        uids = [f"{left:016x}{right:016x}" for left, right in rng.integers(0, 2**62, (rows, 2))]
        broken = rng.random(rows) < 0.05
        vectors = directions[rng.integers(0, 12, rows)] + 0.05 * rng.standard_normal((rows, 8))
        errors = pa.array(["does not decode" if bad else None for bad in broken], pa.string())
        described = [
            {"uid": uids[row], "image_id": images[row], "index": row, "size_bytes": int(rng.integers(1, 4))}
            for row in range(rows)
        ]
        path = f"rows-{number}.parquet"
        store = Folder(folder)
        units = {stage: f"{stage}-{number}.parquet" for stage in STAGES}
        tables = {
            path: pa.Table.from_pylist(described, schema=ROWS_SCHEMA),
            units["decode"]: pa.table({"pixels": pa.array(rng.integers(1, 12, rows), mask=broken), "error": errors}),
            units["hash"]: pa.table(
                {
                    "phash64": pa.array(hashes, mask=broken),
                    "thumbnail": pa.array([looks[i] for i in rng.integers(0, 4, rows)], pa.binary(192), mask=broken),
                    "error": errors,
                }
            ),
            units["clip"]: pa.table(
                {
                    "image_embedding": pa.array(list(vectors.astype(np.float16)), pa.list_(pa.float16(), 8)),
                    "error": errors,
                }
            ),
        }
        for name, table in tables.items():
            store.write_with(name, lambda stream, table=table: pq.write_table(table, stream))
        listed.append(JudgedShard(digest, path, units))
    return Case(tuple(listed), RULES, STAGES, {})


def judged(folder: Path, case: Case, engine=None, parents=()) -> tuple[dict, list[pa.Table]]:
    store = Folder(folder)
    paths = [f"verdicts-{number}.parquet" for number in range(len(case.shards))]
    result = judge_all(engine or LocalEngine(), store, case, HeldOut(0.3, 1), parents, paths)
    return result, [pq.read_table(store.open(path)) for path in paths]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Case, dict, list[pa.Table]]:
    """One case judged with every barrier seeing all rows at once."""
    folder = tmp_path_factory.mktemp("whole")
    case = write_case(folder)
    result, tables = judged(folder, case)
    shutil.rmtree(folder / judging.FOLDER)
    return folder, case, result, tables


def test_every_rule_of_the_case_drops_rows(whole):
    _, _, result, tables = whole
    dropped = {step["rule"]: step["rejected"] for step in result["funnel"]["steps"]}
    assert all(count > 0 for count in dropped.values()), dropped
    assert result["funnel"]["failed"] > 0
    rows = [row for table in tables for row in table.to_pylist()]
    assert all((row["keeper_uid"] is None) == (row["rule"] not in ("exact", "near", "semantic")) for row in rows)


@pytest.mark.parametrize("part_rows", [7, 40, 120])
@pytest.mark.parametrize("most_pieces", [2, 1024])
def test_parts_and_pieces_change_nothing(whole, tmp_path, monkeypatch, part_rows, most_pieces):
    folder, case, result, tables = whole
    shutil.copytree(folder, tmp_path / "store")
    monkeypatch.setattr(barriers, "PART_ROWS", part_rows)
    monkeypatch.setattr(barriers, "SEARCH_ROWS", 32)
    monkeypatch.setattr(judging, "MOST_PIECES", most_pieces)
    again, cut = judged(tmp_path / "store", case)
    assert again == result
    assert cut == tables


@pytest.mark.parametrize(
    "rules",
    [{"near": NearDuplicates(radius=6, second_look=None)}, {"near": NearDuplicates(radius=0)}, {}],
    ids=["hash alone", "radius 0", "no rules"],
)
def test_other_rules_by_parts_too(whole, tmp_path, monkeypatch, rules):
    folder, case, _, _ = whole
    found = []
    for part_rows in (10**6, 20):
        store = tmp_path / str(part_rows)
        shutil.copytree(folder, store)
        monkeypatch.setattr(barriers, "PART_ROWS", part_rows)
        found.append(judged(store, Case(case.shards, rules, STAGES, {})))
    assert found[0] == found[1]


class DyingEngine(LocalEngine):
    """A worker that dies at its n-th task, after the task's work and before its record, as a killed process would."""

    def __init__(self, at: int) -> None:
        self.left = at

    def map(self, worker, config, tasks, *, gpus=0.0):
        run = worker(config)
        for task in tasks:
            if self.left == 0:
                run.store.write_json = self._die
            self.left -= 1
            yield run(task)

    def _die(self, path, value):
        raise KeyboardInterrupt


class TwiceEngine(LocalEngine):
    """Every task runs twice, as where a worker died after its record and Ray did not hear of it."""

    def map(self, worker, config, tasks, *, gpus=0.0):
        first, second = worker(config), worker(config)
        for task in tasks:
            first(task)
            yield second(task)


def test_a_task_that_runs_twice_leaves_what_one_run_leaves(whole, tmp_path, monkeypatch):
    # Dedupe that remembers what it has seen in an actor drops the rows of a task that is tried again.
    folder, case, result, tables = whole
    shutil.copytree(folder, tmp_path / "store")
    monkeypatch.setattr(barriers, "PART_ROWS", 40)
    assert judged(tmp_path / "store", case, TwiceEngine()) == (result, tables)


@pytest.mark.parametrize("at", [0, 3, 6, 11, 17, 26, 41])
def test_judging_killed_anywhere_goes_on_where_it_stood(whole, tmp_path, monkeypatch, at):
    folder, case, result, tables = whole
    shutil.copytree(folder, tmp_path / "store")
    monkeypatch.setattr(barriers, "PART_ROWS", 40)
    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "store", case, DyingEngine(at))
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / judging.FOLDER).rglob("*.json")}
    assert len(records) == at
    assert judged(tmp_path / "store", case) == (result, tables)
    assert {path: path.stat().st_mtime_ns for path in records} == records


def test_rows_of_an_earlier_snapshot_drop_new_ones_and_are_not_judged(whole, tmp_path, monkeypatch):
    folder, case, _, tables = whole
    kept = [row for table in tables for row in table.to_pylist() if row["verdict"] == "kept"]
    assert kept
    shutil.copytree(folder, tmp_path / "store")
    store = Folder(tmp_path / "store")
    # What is held: the first shard, whole, under other uids.
    first = case.shards[0]
    held = pq.read_table(store.open(first.rows)).select(["image_id", "index", "size_bytes"])
    held = held.append_column("uid", pa.array([f"{row:032x}" for row in range(held.num_rows)]))
    for stage, names in (("decode", ["pixels"]), ("hash", ["phash64", "thumbnail"]), ("clip", ["image_embedding"])):
        unit = pq.read_table(store.open(first.units[stage]))
        for name in names:
            held = held.append_column(f"{stage}.{name}", unit[name])
    good = np.array([value is not None for value in held["decode.pixels"].to_pylist()])
    held = held.filter(pa.array(good))
    store.write_with("held.parquet", lambda stream: pq.write_table(held, stream))
    against = Case(
        case.shards, {"exact": ExactDuplicates(), "near": NearDuplicates(radius=4)}, STAGES, {}, ("held.parquet",)
    )
    found = []
    for part_rows in (10**6, 40):
        monkeypatch.setattr(barriers, "PART_ROWS", part_rows)
        result, cut = judged(tmp_path / "store", against)
        shutil.rmtree(tmp_path / "store" / judging.FOLDER)
        found.append((result, cut))
        assert result["funnel"]["rows_in"] == 300
    assert found[0] == found[1]
    # Every row of that shard that can be judged is a copy of a held one.
    rows = cut[0].to_pylist()
    assert [row["rule"] for row in rows] == ["exact" if ok else None for ok in good]
    assert all(int(row["keeper_uid"], 16) < 60 for row in rows if row["rule"])


def test_a_task_reads_and_holds_its_part_and_nothing_of_it_passes_through_the_driver(whole, tmp_path, monkeypatch):
    folder, case, _, _ = whole
    shutil.copytree(folder, tmp_path / "store")
    monkeypatch.setattr(barriers, "PART_ROWS", 40)
    sizes: dict[str, list[int]] = {}
    original = JudgeWorker.__call__

    def measured(self, task):
        result = original(self, task)
        sizes.setdefault(task["do"], []).append(len(json.dumps(task)) + len(json.dumps(result)))
        return result

    monkeypatch.setattr(JudgeWorker, "__call__", measured)
    judged(tmp_path / "store", case)
    assert {"search", "join", "confirm", "components", "route", "solve", "fit"} <= sizes.keys()
    # 300 rows; a task and its result say where and how many, never what.
    assert max(max(listed) for listed in sizes.values()) < 2500


class CountsPyList(Threshold):
    """A barrier of another package: not separable, so it sees all rows at once."""

    type: ClassVar[str] = "counts"
    barrier: ClassVar[bool] = True


def test_a_barrier_that_cannot_be_cut_sees_all_rows_at_once(whole, tmp_path, monkeypatch):
    folder, case, _, _ = whole
    shutil.copytree(folder, tmp_path / "store")
    monkeypatch.setattr(barriers, "PART_ROWS", 40)
    rules = {"row": Threshold(column="decode.pixels", at_least=4)}
    alone, _ = judged(tmp_path / "store", Case(case.shards, rules, STAGES, {}))
    rules = {"row": CountsPyList(column="decode.pixels", at_least=4)}
    barrier, _ = judged(tmp_path / "store", Case(case.shards, rules, STAGES, {}))
    assert barrier["kept"] == alone["kept"]


def content(snapshot) -> dict[str, bytes]:
    root = Path(snapshot.folder.url)
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "provenance.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_ray_and_parts_give_the_snapshot_of_one_process(tmp_path, monkeypatch, ray_temp):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    recipe = load_recipe({**raw.RECIPE, "input": {"url": raw.write_world(tmp_path / "raw")}})
    local = curate(recipe, Options(str(tmp_path / "local"), engine="local", quiet=True, report=False))
    assert not (tmp_path / "local" / judging.FOLDER).exists()
    # Every barrier by parts, and every task of judging on Ray's workers.
    monkeypatch.setattr(barriers, "PART_ROWS", 20)
    monkeypatch.setattr(runner_module, "SMALL_INPUT_BYTES", 0)
    on_ray = curate(recipe, Options(str(tmp_path / "ray"), engine="ray", workers=2, quiet=True, report=False))
    assert on_ray.id == local.id
    assert content(on_ray) == content(local)
    assert open_snapshot(str(tmp_path / "ray")).id == local.id


def test_what_travels_between_tasks_is_a_few_hundred_bytes_a_row(whole, tmp_path, monkeypatch):
    # An image, or a column nobody asked for, would show at once.
    folder, case, _, _ = whole
    shutil.copytree(folder, tmp_path / "store")
    monkeypatch.setattr(barriers, "PART_ROWS", 150)
    judged(tmp_path / "store", case)
    for kind in ("alive", "routed", "home", "join"):
        for path in (tmp_path / "store" / judging.FOLDER).rglob(f"{kind}-*.arrow"):
            reader = pa.ipc.open_file(path)
            table = reader.read_all()
            assert table.nbytes <= 300 * table.num_rows
            assert set(table.column_names) <= {
                *("uid", "shard", "index", "row", "image_id", "size_bytes", "decode.pixels"),
                *("hash.phash64", "hash.thumbnail", "clip.image_embedding", "hash", "look", "other"),
            }


def test_judging_clears_its_own_folder_and_nothing_else(tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=1)
    options = Options(str(tmp_path / "out"), engine="local", quiet=True, report=False)
    first = curate(load_recipe({**raw.RECIPE, "input": {"url": url}}), options)
    (tmp_path / "out" / "units" / "somebody.parquet").write_bytes(b"else's")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second = curate(load_recipe({**raw.RECIPE, "input": {"url": url}}, ["rules.near.radius=2"]), options)
    assert second.id != first.id
    after = {path: path.read_bytes() for path in before}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"latest"}
