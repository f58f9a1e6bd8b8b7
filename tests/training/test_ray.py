"""Training on real Ray Train workers: the losses of one process, also after the driver was killed outright."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.workers import launch_here
from tests.training.ranks import REPOSITORY, job, losses, metrics, train_on_ranks
from tests.training.small import recipe
from training import checkpoint as ckpt
from training import commands
from training.recipe import load_recipe

PROGRAM = "import typer; from training.commands import register; app = typer.Typer(); register(app); app()"


def test_ray_workers_have_the_losses_of_one_process(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    given = recipe(workers=2, zero_stage=1, steps=6)
    run = commands.train(
        load_recipe(given), data=str(ground / "snapshot"), output=tmp_path / "run", models=[str(ground)], device="cpu"
    )
    alone = job(ground, tmp_path / "alone", {**given, "workers": 1, "zero_stage": 0})
    launch_here("training.loop:run", alone, threads=1)
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert json.loads((run / "run.json").read_text())["finished"] is not None
    said = capfd.readouterr().err
    assert "6 steps on snapshot" in said
    assert "steps/s" in said
    assert "left" in said


@pytest.mark.full
def test_a_killed_driver_run_again_repeats_the_losses_from_the_last_checkpoint(ground: Path, tmp_path: Path) -> None:
    """SIGKILL to the driver in the middle; its orphans may still be running when the same command is given again."""
    given = recipe(workers=2, zero_stage=2, steps=240, checkpoint_every=20, validate_every=60)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    run = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, "train", str(tmp_path / "r.yaml"), "--data", str(ground / "snapshot")]
    command += ["--output", str(run), "--models", str(ground), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    said = open(tmp_path / "said.txt", "w")  # noqa: SIM115 - the killed process writes to it
    driver = subprocess.Popen(command, env=environment, stdout=said, stderr=said, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 45:
        assert driver.poll() is None, (tmp_path / "said.txt").read_text()
        assert time.monotonic() < deadline, "no 45 steps in five minutes"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing from step-0000" in (run / "log.txt").read_text()
    assert [line["step"] for line in metrics(run)] == list(range(1, 241))

    train_on_ranks([job(ground, tmp_path / "whole", given)], workers=2)
    assert losses(run) == losses(tmp_path / "whole")
    assert losses(run, "held_out") == losses(tmp_path / "whole", "held_out")
    digests = {ckpt.read_model(folder / "model")["digest"] for folder in (run, tmp_path / "whole")}
    assert len(digests) == 1
    assert not list((run / "checkpoints").glob(".step-*"))
    assert not (run / "lease.json").exists()
