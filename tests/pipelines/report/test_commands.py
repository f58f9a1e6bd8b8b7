"""`sluice report` and `sluice show` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipelines.lineage.catalog import open_catalog
from pipelines.lineage.questions import impact
from pipelines.lineage.record import Artifact, record_run
from pipelines.report import commands
from tests.pipelines.handmade import Handmade, make_run, make_snapshot
from tests.pipelines.report.reading import assert_inert


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    commands.register(app)
    return app


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Handmade:
    return make_snapshot(tmp_path_factory.mktemp("made"))


def _say(app: typer.Typer, *words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_report_of_a_snapshot_is_written_and_found_again(app: typer.Typer, made: Handmade, tmp_path: Path) -> None:
    with record_run(None, kind="curate", name="handmade") as run:
        run.consume_many(Artifact("raw_shard", digest, str(path), path.name) for digest, path in made.raw.items())
        run.produce(Artifact("snapshot", made.id, str(made.snapshot), "handmade"))
    output = tmp_path / "deep" / "page.html"
    said = _say(app, "report", str(made.store), "--output", str(output))
    assert f"wrote {output}" in said
    page = assert_inert(output.read_text())
    assert "raw shard 00000.tar" in page.all("section", id="lineage")[0].text
    # The page holds pictures: it can be found from the raw shard they came from.
    assert [one.address for one in impact(open_catalog(), "00000.tar").of_kind("report")] == [str(output)]


def test_report_of_a_run_lies_in_its_folder(app: typer.Typer, made: Handmade, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "student", "distill", made)
    _say(app, "report", str(folder))
    assert "Drawn from the same prompts" in assert_inert((folder / "report.html").read_text()).text


def test_show_by_reason_and_verdict(app: typer.Typer, made: Handmade, tmp_path: Path) -> None:
    output = str(tmp_path / "samples.html")
    text = _say(app, "show", str(made.store), "--reason", "near", "--output", output)
    counts = made.counts()
    assert text.count("x dropped") == counts["near"]
    assert f"{counts['near']} rows fit" in text
    page = assert_inert(Path(output).read_text())
    assert len(page.all("div", class_="pair")) == counts["near"]
    _say(app, "show", str(made.store), "--verdict", "failed", "--output", output)
    assert "failed by decode" in assert_inert(Path(output).read_text()).text
    _say(app, "show", str(made.store), "--reason", "below 0.24", "--output", output)
    assert "dropped by clip" in assert_inert(Path(output).read_text()).text


def test_show_everything_in_the_order_of_the_recipe(app: typer.Typer, made: Handmade, tmp_path: Path) -> None:
    output = tmp_path / "samples.html"
    _say(app, "show", str(made.store), "--output", str(output), "--limit", "3")
    titles = [one.text for one in assert_inert(output.read_text()).all("h2")]
    assert [title.split()[-1] for title in titles] == ["kept", "min_side", "words", "clip", "near", "best", "decode"]


def test_show_as_json(app: typer.Typer, made: Handmade) -> None:
    said = json.loads(_say(app, "show", str(made.store), "--reason", "clip", "--json"))
    assert said["rows"] == made.counts()["clip"]
    truth = {row["uid"] for row in made.rows if row["rule"] == "clip"}
    assert {one["uid"] for one in said["groups"][0]["samples"]} == truth


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--reason", "no such rule"), "no row of snapshot .* fits; causes in it: best, clip, decode"),
        (("--reason", "' OR 1=1 --"), "no row of snapshot"),
        (("--verdict", "dropped"), "none of kept, rejected, failed"),
    ],
)
def test_show_nothing_is_one_sentence(app: typer.Typer, made: Handmade, words: tuple[str, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _say(app, "show", str(made.store), *words)
