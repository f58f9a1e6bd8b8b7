"""`sluice train`, `distill` and `sample`: what they write, what they say, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.training.ranks import losses
from tests.training.small import recipe
from training import checkpoint as ckpt
from training import commands

STUDENT = {
    "name": "student",
    "objective": {"type": "progressive", "steps": 2, "teacher_steps_per_step": 2, "guidance_scale": 2.0},
    "batch": {"global_batch": 8, "micro_batch": 4},
    "steps": 4,
    "precision": "fp32",
    "log_every": 1,
}


@pytest.fixture
def sluice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command of this room in this process; a user's mistake raises here what the console script prints."""
    app = typer.Typer()
    commands.register(app)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def written(path: Path, given: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(given))
    return path


@pytest.fixture(scope="module")
def teacher(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training.recipe import load_recipe

    run = tmp_path_factory.mktemp("runs") / "teacher"
    loaded = load_recipe(recipe(workers=1, steps=10, checkpoint_every=5))
    return commands.train(
        loaded, data=str(ground / "snapshot"), output=run, local=True, models=[str(ground)], quiet=True
    )


def test_train_distill_sample_and_their_lineage(sluice: Any, ground: Path, tmp_path: Path) -> None:
    from pipelines.lineage.catalog import artifacts, edges, open_catalog, runs

    catalog = f"sqlite:///{tmp_path}/lineage.db"
    common = ("--data", ground / "snapshot", "--local", "--models", ground, "--catalog", catalog)
    said = sluice("train", written(tmp_path / "t.yaml", recipe(steps=4)), "--output", "teacher", *common)
    assert "teacher " in said
    assert "sluice sample" in said.splitlines()[-1]
    said = sluice("distill", written(tmp_path / "d.yaml", STUDENT), "--teacher", "teacher", "--output", "few", *common)
    assert "student " in said
    said = sluice("sample", "few", "--prompt", "a wide red bar", "--prompt", "a tall blue bar", "--output", "drawn")
    assert "in 2 steps, guidance 1" in said

    drawn = json.loads((tmp_path / "drawn" / "samples.json").read_text())
    assert drawn["model"]["kind"] == "student"
    assert drawn["seconds_per_image"] > 0
    assert [one["file"] for one in drawn["samples"]] == ["000.png", "001.png"]
    assert Image.open(tmp_path / "drawn" / "000.png").size == (16, 16)
    assert Image.open(tmp_path / "drawn" / "grid.png").width > 200

    teacher, student = (ckpt.read_model(tmp_path / name / "model") for name in ("teacher", "few"))
    snapshot = json.loads((ground / "snapshot" / "manifest.json").read_text())["id"]
    with open_catalog(catalog).read() as connection:
        rows = connection.execute(
            runs.join(edges, edges.c.run_id == runs.c.id)
            .join(artifacts, artifacts.c.id == edges.c.artifact_id)
            .select()
            .with_only_columns(runs.c.kind, runs.c.status, edges.c.role, artifacts.c.kind, artifacts.c.digest)
        ).all()
    assert {row[1] for row in rows} == {"succeeded"}
    found = {(row[0], row[2], row[3], row[4]) for row in rows}
    text_encoder = teacher["text_encoder"]["digest"]
    assert found >= {
        ("train", "input", "snapshot", snapshot),
        ("train", "input", "weights", text_encoder),
        ("train", "output", "model", teacher["digest"]),
        ("distill", "input", "model", teacher["digest"]),
        ("distill", "input", "snapshot", snapshot),
        ("distill", "output", "student", student["digest"]),
    }
    kept = [ckpt.read_meta(path)["digest"] for path in ckpt.checkpoints(tmp_path / "teacher")]
    assert found >= {("train", "output", "checkpoint", digest) for digest in kept}


def test_the_same_command_again_goes_on(ground: Path, teacher: Path, tmp_path: Path) -> None:
    from training.recipe import load_recipe

    options: dict[str, Any] = {"data": str(ground / "snapshot"), "local": True, "models": [str(ground)], "quiet": True}
    given = recipe(workers=1, steps=10, checkpoint_every=5)
    first = commands.train(load_recipe({**given, "steps": 5}), output=tmp_path / "run", **options)
    before = json.loads((first / "run.json").read_text())
    commands.train(load_recipe(given), output=tmp_path / "run", resume=True, **options)
    assert losses(first) == losses(teacher)
    commands.train(load_recipe(given), output=tmp_path / "run", **options)  # nothing is left to do
    after = json.loads((first / "run.json").read_text())
    assert after["id"] == before["id"]
    assert after["finished"] > before["finished"]
    assert not (first / "lease.json").exists()


def test_what_is_refused_before_anything_runs(sluice: Any, ground: Path, teacher: Path, tmp_path: Path) -> None:
    common = ("--local", "--models", ground)
    data = ("--data", ground / "snapshot")
    good = written(tmp_path / "good.yaml", recipe(workers=1, steps=10, checkpoint_every=5))

    def refused(sentence: str, *arguments: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            sluice(*arguments)

    refused("--data is missing", "train", good, *common)
    refused("is not a snapshot", "train", good, "--data", tmp_path / "none", *common)
    refused("no run to resume", "train", good, *data, *common, "--resume", "--output", "new")
    refused("use sluice distill", "train", written(tmp_path / "d.yaml", STUDENT), *data, *common)
    refused("use sluice train", "distill", good, *data, "--teacher", teacher, *common)
    refused("--teacher is missing", "distill", tmp_path / "d.yaml", *data, *common)
    refused("there is no model here", "distill", tmp_path / "d.yaml", *data, "--teacher", tmp_path, *common)
    refused("is the teacher's", "distill", tmp_path / "d.yaml", *data, "--teacher", teacher, "--set", "resolution=32")
    refused("did you mean 'num_layers'", "train", good, *data, *common, "--set", "model.num_layer=3")
    refused("'elsewhere' were not found", "train", good, *data, *common, "--set", "text_encoder.folder=elsewhere")
    refused("was begun with seed 0", "train", good, *data, *common, "--output", teacher, "--set", "seed=3")
    refused("zero_stage 2", "train", good, *data, *common, "--output", teacher, "--set", "zero_stage=1")
    refused("holds 'good.yaml' and no run.json", "train", good, *data, *common, "--output", tmp_path)
    refused("nothing to draw", "sample", teacher)
    (tmp_path / "p.txt").write_text("# none yet\n\n")
    refused("there is no prompt in it", "sample", teacher, "--prompts", tmp_path / "p.txt")
    assert not (tmp_path / "new").exists()


def test_two_commands_on_one_run(sluice: Any, ground: Path, teacher: Path, tmp_path: Path) -> None:
    from cluster.storage import Folder, lease

    good = written(tmp_path / "good.yaml", recipe(workers=1, steps=10, checkpoint_every=5))
    with lease(Folder(teacher), "sluice train"), pytest.raises(ValueError, match="is being written by sluice train"):
        sluice("train", good, "--data", ground / "snapshot", "--local", "--models", ground, "--output", teacher)


def test_a_picture_depends_on_its_own_seed_only(ground: Path, teacher: Path, tmp_path: Path) -> None:
    words = ["a wide red bar", "a tall blue bar", "a tall red bar"]
    together = commands.draw(teacher, words, output=tmp_path / "a", steps=3, seed=5, guidance=1.5)
    assert (together["steps"], together["guidance_scale"]) == (3, 1.5)
    commands.draw(teacher, words[1:2], output=tmp_path / "b", steps=3, seed=6, guidance=1.5)
    alone, beside = (Image.open(tmp_path / name) for name in ("b/000.png", "a/001.png"))
    differences = [abs(a - b) for a, b in zip(alone.tobytes(), beside.tobytes(), strict=True)]
    assert max(differences) <= 1  # other batch sizes, other last bits


@pytest.mark.parametrize("name", ["train_tiny", "train_cifar10", "train_0.6b", "distill_tiny"])
def test_every_shipped_recipe_plans(sluice: Any, teacher: Path, name: str) -> None:
    path = Path(commands.__file__).parents[1] / "configs" / f"{name}.yaml"
    if name.startswith("distill"):
        said = sluice("distill", path, "--teacher", teacher, "--dry-run")
    else:
        said = sluice("train", path, "--dry-run")
    assert "a rank at ZeRO stage" in said
    if name == "train_0.6b":
        assert "591,747,872 parameters" in said
        assert "text encoder 'gemma-2-2b-it' is not here: 2304 channels are assumed" in said


def test_each_command_has_help_with_an_example(sluice: Any) -> None:
    for name in ("train", "distill", "sample"):
        said = sluice(name, "--help")
        assert f"Example: `sluice {name}" in said or f"Example: sluice {name}" in said


def test_registering_costs_no_heavy_import() -> None:
    program = (
        "import sys, typer; import training.commands as c; c.register(typer.Typer());"
        "print([name for name in ('torch', 'ray', 'transformers', 'deepspeed', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(commands.__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"
