"""Recaptioning through the runner: the captions table, a killed run, another recipe, and training behind it."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.engine import LocalEngine
from cluster.storage import Folder
from pipelines.recipe import load_recipe
from pipelines.runner import Options, curate, describe_plan, plan_run, select
from pipelines.snapshot import Snapshot
from tests.pipelines import raw
from tests.stages.chat_server import ChatServerForTests
from training.captions import CaptionSampler
from training.data import SnapshotSamples
from training.recipe import CaptionOptions

KEPT = 10  # of the 15 rows of a shard that raw.write_world writes


def recipe(folder: Path, server: str, **options: Any) -> dict[str, Any]:
    return {
        **raw.RECIPE,
        "input": {"url": str(folder / "raw")},
        "stages": {
            **raw.RECIPE["stages"],
            "clip": {"type": "clip_score", "model": "clip", "after": ["near"]},
            "short": {
                "type": "recaption",
                "engine": "server",
                "server": server,
                "model": "seer",
                "revision": "r1",
                "captions": 2,
                "temperature": 0.7,
                "after": ["near"],
                **options,
            },
            "scores": {"type": "synthetic_score", "of": "short", "model": "clip", "after": ["near"]},
        },
    }


def run(folder: Path, given: dict[str, Any], name: str = "out") -> Snapshot:
    return curate(load_recipe(given), Options(output=str(folder / name), engine="local", quiet=True, report=False))


def dry_run(folder: Path, given: dict[str, Any]) -> str:
    options, store = Options(output=str(folder / "out"), quiet=True), Folder(str(folder / "out"))
    return describe_plan(plan_run(load_recipe(given), options, store, LocalEngine()), store)


def captions(snapshot: Snapshot) -> list[dict[str, Any]]:
    return [row for table in snapshot.tables("captions") for row in table.to_pylist()]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    raw.write_world(tmp_path / "raw", shards=1)
    return tmp_path


def test_originals_and_synthetic_captions_stand_side_by_side(world: Path) -> None:
    with ChatServerForTests(lambda number, text: "too long" if number == 3 else "well") as server:
        given = recipe(world, server.url)
        snapshot = run(world, given)
        assert len(server.served) == 2 * KEPT
        # Another output with the same cache, and a recipe that cleans otherwise, pay for nothing.
        other = {**recipe(world, server.url, language=""), "cache": str(world / "out/answers")}
        run(world, other, "other")
        assert len(server.served) == 2 * KEPT
    rows = [row for table in snapshot.tables("ledger") for row in table.to_pylist()]
    ledger = {row["uid"]: row for row in rows if row["verdict"] == "kept"}  # a duplicate has its keeper's uid
    assert not any("texts" in name for name in next(iter(ledger.values())))
    made = [row for row in captions(snapshot) if row["source"] == "synthetic"]
    kept = set(ledger)
    assert len(made) == 2 * KEPT == len({row["caption_id"] for row in made})
    assert {row["uid"] for row in made} == kept
    assert {(row["model"], row["revision"], row["captioner"]) for row in made} == {("seer", "r1", "short")}
    assert sorted(row["status"] for row in made) == ["success"] * (2 * KEPT - 1) + ["truncated"]
    assert all(row["prompt_tokens"] == 100 and row["token_count"] > 0 for row in made)
    assert all(-1 <= row["clip_score"] <= 1 for row in made)
    best = {uid: max(row["clip_score"] for row in made if row["uid"] == uid) for uid in kept}
    assert {uid: ledger[uid]["scores.best"] for uid in kept} == pytest.approx(best)
    # A selection keeps the captions and asks nobody: the server has gone.
    chosen = select(snapshot, load_recipe(given), Options(output=str(world / "out"), quiet=True, report=False))
    assert captions(chosen) == captions(snapshot)


def test_training_reads_the_synthetic_captions(world: Path) -> None:
    with ChatServerForTests() as server:
        samples = SnapshotSamples(run(world, recipe(world, server.url)))
    sampler = CaptionSampler(CaptionOptions(synthetic_fraction=1, weighting="softmax"), 0)
    rows = samples.rows(0, "train")
    assert rows
    for row in rows:
        found = samples.captions(samples.read(row, "train"))
        assert [one.source for one in found].count("synthetic") == 2
        assert sampler.choose(found, row.uid, 0).text.startswith("A picture that is known as")


def test_a_killed_run_asks_only_what_was_not_recorded(tmp_path: Path) -> None:
    raw.write_world(tmp_path / "raw", shards=2, rows=30)
    with ChatServerForTests(latency_s=0.1) as server:
        given = recipe(tmp_path, server.url, in_flight=4)
        del given["stages"]["scores"], given["stages"]["clip"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        code = (
            "from pipelines.recipe import load_recipe; from pipelines.runner import Options, curate; "
            f"curate(load_recipe({str(tmp_path / 'recipe.yaml')!r}), Options(output={str(tmp_path / 'out')!r}, "
            "engine='local', quiet=True, report=False))"
        )
        started = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
        deadline = time.monotonic() + 120
        while len(server.served) < 30 and time.monotonic() < deadline and started.poll() is None:
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
        started.wait()
        recorded = sqlite3.connect(tmp_path / "out/answers/answers.db").execute("SELECT count(*) FROM answers")
        before = int(recorded.fetchone()[0])
        asked_first = len(server.served)
        assert 0 < before <= asked_first < 120
        (tmp_path / "out/lease.json").unlink(missing_ok=True)  # its owner is dead: waiting for it to lapse takes 30 s
        snapshot = run(tmp_path, given)
        assert len(server.served) - asked_first == 120 - before
    made = [row for row in captions(snapshot) if row["source"] == "synthetic"]
    assert len(made) == 120 == len({row["caption_id"] for row in made})
    assert {row["status"] for row in made} == {"success"}


def test_a_dry_run_estimates_from_recorded_answers(world: Path) -> None:
    prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 10.0}
    with ChatServerForTests() as server:
        given = recipe(world, server.url, **prices)
        assert "none of seer is recorded yet" in dry_run(world, given)
        run(world, given)
        # Another prompt: nothing of it is recorded, but the model's tokens are known.
        other = recipe(world, server.url, prompts=["Which colours are there?"], **prices)
        said = dry_run(world, other)
    # 15 rows, 2 captions each, 100 tokens in and 8 out: the gate is not judged yet, so all rows count.
    assert "short: at most 30 answers, 3,000 + 240 tokens, USD 0.01" in said
    assert f"(means of {2 * KEPT} recorded answers)" in said
