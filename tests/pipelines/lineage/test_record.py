"""Recording: one run whatever happens to it, idempotent, from many threads and processes at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pipelines.lineage.catalog import Catalog, artifacts, attempts, edges, open_catalog, runs
from pipelines.lineage.questions import show
from pipelines.lineage.record import Artifact, code_version, record_run


def _rows(catalog: Catalog, table: sa.Table) -> list[dict[str, Any]]:
    with catalog.read() as connection:
        return [dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()]


def test_a_run_with_its_artifacts(catalog: Catalog) -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    ticks = iter(now + timedelta(seconds=n) for n in range(100))
    with record_run(
        catalog,
        kind="curate",
        name="flickr",
        config={"rules": {"clip": 0.28}},
        seeds={"held_out": 7},
        run_id="run-1",
        clock=lambda: next(ticks),
    ) as run:
        run.consume_many(
            Artifact("raw_shard", f"{n:064x}", f"/data/{n}.tar", f"{n}.tar", {"rows": n}) for n in (3, 1, 2)
        )
        run.produce(Artifact(kind="snapshot", digest="ab" * 16, address="/out", facts={"rows": 6}))
    (row,) = _rows(catalog, runs)
    assert (row["status"], row["config"], row["seeds"]) == ("succeeded", {"rules": {"clip": 0.28}}, {"held_out": 7})
    assert row["started"] == now
    assert row["finished"] > now
    card = show(catalog, "run-1")
    assert [one.name for one in card.read] == ["3.tar", "1.tar", "2.tar"]  # in the order it was said
    assert [one.digest for one in card.wrote] == ["ab" * 16]
    assert card.read[0].facts == {"rows": 3}


def test_saying_it_again_changes_nothing(catalog: Catalog) -> None:
    for _ in range(3):
        with record_run(catalog, kind="train", name="tiny", run_id="r") as run:
            for _ in range(2):
                run.consume(Artifact("snapshot", "s1", "/a"))
                run.produce_many([Artifact("model", "m1"), Artifact("model", "m1")])
    assert len(_rows(catalog, runs)) == 1
    assert [row["number"] for row in _rows(catalog, attempts)] == [1, 2, 3]
    assert len(_rows(catalog, artifacts)) == 2
    assert len(_rows(catalog, edges)) == 2


def test_a_later_word_adds_and_an_empty_one_takes_nothing_away(catalog: Catalog) -> None:
    with record_run(catalog, kind="train", name="t") as run:
        run.consume(Artifact("snapshot", "s1", "/a", "first", {"rows": 1}))
        run.consume(Artifact("snapshot", "s1"))
    assert {key: _rows(catalog, artifacts)[0][key] for key in ("address", "name", "facts")} == {
        "address": "/a",
        "name": "first",
        "facts": {"rows": 1},
    }
    with record_run(catalog, kind="train", name="t") as run:
        run.consume(Artifact("snapshot", "s1", "/b", "second", {"rows": 2}))
    assert _rows(catalog, artifacts)[0]["address"] == "/b"
    assert {row["address"] for row in _rows(catalog, edges)} == {"/a", "/b"}  # each run keeps the address it used


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("disk full"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (SystemExit(1), "failed"),
        (SystemExit(0), "succeeded"),
    ],
)
def test_how_a_run_ends(sqlite_catalog: Catalog, error: BaseException, status: str) -> None:

    def work() -> None:
        with record_run(sqlite_catalog, kind="train", name="t") as run:
            run.consume(Artifact("snapshot", "s1"))
            raise error

    with pytest.raises(type(error)):
        work()
    (row,) = _rows(sqlite_catalog, runs)
    assert row["status"] == status
    assert (row["error"] is None) == (status == "succeeded")
    if isinstance(error, RuntimeError):
        assert "disk full" in row["error"]
    assert len(_rows(sqlite_catalog, edges)) == 1  # what it had read stays known


def test_resuming_after_a_failure_is_the_same_run(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), record_run(catalog, kind="train", name="t", run_id="r", config={"lr": 1}):
        raise RuntimeError("preempted")
    with record_run(catalog, kind="train", name="t", run_id="r", config={"lr": 2}):
        pass
    (row,) = _rows(catalog, runs)
    assert (row["status"], row["error"], row["config"]) == ("succeeded", None, {"lr": 2})
    first, second = _rows(catalog, attempts)
    assert (first["status"], second["status"]) == ("failed", "succeeded")
    assert first["config_digest"] != second["config_digest"]


def test_a_killed_run_is_not_running_for_ever(sqlite_catalog: Catalog) -> None:
    script = (
        "import sys, time; from pipelines.lineage.record import *\n"
        "with record_run(sys.argv[1], kind='train', name='t', run_id='r', version='1') as run:\n"
        "    run.consume(Artifact('snapshot', 's1')); print('recorded', flush=True); time.sleep(60)\n"
    )
    url = sqlite_catalog.engine.url.render_as_string()
    process = subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "recorded\n"
    assert show(sqlite_catalog, "r").subject.status == "running"  # type: ignore[union-attr]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert show(sqlite_catalog, "r").subject.status == "interrupted"  # type: ignore[union-attr]
    with record_run(sqlite_catalog, kind="train", name="t", run_id="r"):
        pass
    assert [row["status"] for row in _rows(sqlite_catalog, attempts)] == ["interrupted", "succeeded"]


SHARED = [f"{n:032x}" for n in range(150)]


def _record_some(task: tuple[str, int]) -> None:
    url, seed = task
    chance = random.Random(seed)
    catalog = open_catalog(url)
    for number in range(3):
        shuffled = SHARED[:]
        chance.shuffle(shuffled)
        # Even ones all write to one run, odd ones to runs of their own.
        run_id = "shared" if seed % 2 == 0 else f"own-{seed}-{number}"
        with record_run(catalog, kind="curate", name="n", run_id=run_id, version="1") as run:
            run.consume_many(Artifact("raw_shard", digest, f"/{seed}/{digest}") for digest in shuffled)
            run.produce(Artifact("snapshot", f"snapshot-{seed}-{number}"))


def test_many_processes_record_at_once(catalog_url: str) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_record_some, [(catalog_url, seed) for seed in range(4)], chunksize=1)
    catalog = open_catalog(catalog_url)
    found = _rows(catalog, runs)
    assert len(found) == 1 + 2 * 3
    assert {row["status"] for row in found} == {"succeeded"}
    assert sorted(row["number"] for row in _rows(catalog, attempts) if row["run_id"] == "shared") == [1, 2, 3, 4, 5, 6]
    assert len(_rows(catalog, artifacts)) == len(SHARED) + 4 * 3
    of_run = [row for row in _rows(catalog, edges) if row["run_id"] == "shared"]
    assert len(of_run) == len(SHARED) + 6
    assert len({(row["role"], row["artifact_id"]) for row in of_run}) == len(of_run)


def test_one_run_from_many_threads(sqlite_catalog: Catalog) -> None:
    with record_run(sqlite_catalog, kind="curate", name="n") as run:
        threads = [
            threading.Thread(target=run.consume_many, args=([Artifact("raw_shard", f"{n}-{m}") for m in range(10)],))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(_rows(sqlite_catalog, edges)) == 40
    assert len({row["position"] for row in _rows(sqlite_catalog, edges)}) == 40


def test_ten_thousand_raw_shards_take_seconds(catalog: Catalog) -> None:
    began = time.monotonic()
    with record_run(catalog, kind="curate", name="big", version="1") as run:
        run.consume_many(Artifact("raw_shard", f"{n:064x}", f"s3://bucket/{n:08d}.tar") for n in range(10_000))
    assert time.monotonic() - began < 30
    with catalog.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(edges)).scalar_one() == 10_000


@pytest.mark.parametrize("name", ["'; DROP TABLE runs; --", '"quoted"', "%_\\", "ünïcödé 图", "a" * 5000], ids="abcde")
def test_names_are_only_names(catalog: Catalog, name: str) -> None:
    with record_run(catalog, kind="train", name=name, config={name: name}) as run:
        run.produce(Artifact("model", "m1", address=name, name=name, facts={name[:50]: name}))
    assert _rows(catalog, runs)[0]["name"] == name
    card = show(catalog, name)
    assert card.subject.name == name


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Artifact("Raw Shard", "x"),
        lambda: Artifact("model", ""),
        lambda: Artifact("model", "two words"),
        lambda: Artifact("model", "x" * 129),
    ],
)
def test_what_is_no_artifact_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"kind|digest"):
        wrong()


def test_run_ids_are_checked(sqlite_catalog: Catalog) -> None:
    with (
        pytest.raises(ValueError, match="a run's id is"),
        record_run(sqlite_catalog, kind="train", name="t", run_id="../x"),
    ):
        pass


def test_work_recorded_afterwards_keeps_its_own_start(sqlite_catalog: Catalog) -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    with record_run(sqlite_catalog, kind="curate", name="t", started=began):
        pass
    assert _rows(sqlite_catalog, runs)[0]["started"] == began


def test_code_version_is_never_empty() -> None:
    assert code_version()
