"""The commands as a user types them: plain text, JSON, and a cheap import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipelines.lineage import commands
from pipelines.lineage.record import Artifact, record_run
from tests.pipelines.handmade import Handmade, make_snapshot


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    commands.register(app)
    return app


@pytest.fixture
def made(tmp_path: Path) -> Handmade:
    made = make_snapshot(tmp_path / "made")
    with record_run(None, kind="curate", name="handmade") as run:
        run.consume_many(Artifact("raw_shard", digest, str(path), path.name) for digest, path in made.raw.items())
        run.produce(Artifact("snapshot", made.id, str(made.snapshot), "handmade", {"rows": 80}))
    with record_run(None, kind="train", name="tiny") as run:
        run.consume(Artifact("snapshot", made.id))
        run.produce(Artifact("model", "70" * 16, name="teacher"))
    return made


def _say(app: typer.Typer, *words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_trace(app: typer.Typer, made: Handmade) -> None:
    text = _say(app, "lineage", "trace", "teacher")
    for digest, path in made.raw.items():
        assert f"raw shard {path.name}  {digest[:12]}" in text
    said = json.loads(_say(app, "lineage", "trace", "teacher", "--json"))
    assert {one["digest"] for one in said["raw_shards"]} == set(made.raw)


def test_impact_and_show(app: typer.Typer, made: Handmade) -> None:
    assert "model teacher" in _say(app, "lineage", "impact", "00000.tar")
    assert "made by    curate run handmade" in _say(app, "lineage", "show", "handmade")
    assert "Next: sluice lineage trace" in _say(app, "lineage", "show", "teacher")
    assert json.loads(_say(app, "lineage", "show", "tiny", "--json"))["run"]["status"] == "succeeded"


def test_why(app: typer.Typer, made: Handmade) -> None:
    row = made.first(rule="near")
    assert f"uid {row['uid']}" in _say(app, "why", row["uid"])
    said = json.loads(_say(app, "why", row["uid"], "--snapshot", str(made.store), "--json"))
    (story,) = said["occurrences"]
    assert story["keeper"]["uid"] == row["keeper_uid"]
    assert [one["state"] for one in story["judgements"]] == ["passed", "passed", "passed", "failed", "not_reached"]


def test_help_has_an_example(app: typer.Typer) -> None:
    for words in (["why"], ["lineage", "show"], ["lineage", "trace"], ["lineage", "impact"]):
        assert "Example:" in _say(app, *words, "--help")


def test_importing_the_commands_is_cheap() -> None:
    heavy = ("sqlalchemy", "duckdb", "pyarrow", "alembic", "jinja2", "PIL", "numpy", "torch", "ray")
    script = (
        "import sys, pipelines.lineage.commands, pipelines.report.commands\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
