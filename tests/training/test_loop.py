"""The loop learns, repeats itself to the last bit after an interruption, and does not depend on who shares the work."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.workers import WorkerContext, launch_here
from tests.training.ranks import job, losses, metrics, train_on_ranks
from tests.training.small import recipe
from training import checkpoint as ckpt
from training.loop import Training, TrainingError, model_config, validation_slices
from training.recipe import load_recipe


def train_here(ground: Path, run: Path, given: dict[str, Any], **changes: Any) -> Path:
    launch_here("training.loop:run", job(ground, run, {**given, "workers": 1}, **changes), threads=1)
    return run


@pytest.fixture(scope="session")
def alone(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process, ZeRO stage 0, fp32, 20 steps: what all others are held against."""
    return train_here(ground, tmp_path_factory.mktemp("alone") / "run", recipe(zero_stage=0))


def test_it_learns_and_says_so(alone: Path) -> None:
    lines = metrics(alone)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["samples_seen"] == 160
    assert lines[0]["lr"] == pytest.approx(2e-4)
    assert all(later["seconds"] > earlier["seconds"] for earlier, later in itertools.pairwise(lines))
    held_out = metrics(alone, "held_out")
    assert [line["step"] for line in held_out] == [10, 20]
    assert held_out[-1]["samples"] == 8
    said = (alone / "log.txt").read_text()
    assert "held_out loss" in said
    assert "steps/s" in said
    assert "left" in said


def test_the_model_is_a_folder_that_stands_alone(alone: Path, ground: Path) -> None:
    from diffusers import SanaTransformer2DModel

    from training.linear_dit import load_diffusers_folder

    described = ckpt.read_model(alone / "model")
    assert described["kind"] == "teacher"
    assert described["sampling"]["steps"] == 20
    assert described["lineage"]["snapshot"] == json.loads((ground / "snapshot" / "manifest.json").read_text())["id"]
    assert (alone / "model" / "text_encoder" / "tokenizer.json").exists()
    ours = load_diffusers_folder(alone / "model" / "transformer")
    theirs, report = SanaTransformer2DModel.from_pretrained(alone / "model" / "transformer", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, text = torch.randn(2, 48, 4, 4), torch.randn(2, 5, 32)
    expected = theirs(x, text, torch.tensor([3.0, 900.0])).sample
    assert torch.allclose(ours(x, torch.tensor([3.0, 900.0]), text), expected, atol=1e-5)


def test_a_checkpoint_names_all_that_it_needs(alone: Path) -> None:
    newest = ckpt.checkpoints(alone)[-1]
    meta = ckpt.read_meta(newest)
    assert meta["step"] == 20
    assert meta["sampler"]["next_sample"] == 160
    assert (meta["workers"], meta["zero_stage"], meta["precision"]) == (1, 0, "fp32")
    assert set(meta["files"]) == {
        str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file() and path.name != "meta.json"
    }
    assert ckpt.damage(newest) is None


def test_an_interrupted_run_repeats_itself_to_the_last_bit(alone: Path, ground: Path, tmp_path: Path) -> None:
    run = train_here(ground, tmp_path / "run", recipe(zero_stage=0, steps=13))
    # The attempt that follows finds a checkpoint of step 10 only, and lines of steps that it will do again.
    import shutil

    shutil.rmtree(run / "checkpoints" / "step-000013")
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 14, "split": "tr')  # what a kill leaves
    train_here(ground, run, recipe(zero_stage=0))
    assert "continuing from step-000010" in (run / "log.txt").read_text()
    assert losses(run) == losses(alone)
    assert losses(run, "held_out") == losses(alone, "held_out")
    assert ckpt.read_model(run / "model")["digest"] == ckpt.read_model(alone / "model")["digest"]


def equals_one_process(alone: Path, ground: Path, folder: Path, stages: list[int]) -> None:
    jobs = [job(ground, folder / f"stage{stage}", recipe(workers=2, zero_stage=stage)) for stage in stages]
    train_on_ranks(jobs, workers=2)
    for run in (folder / f"stage{stage}" for stage in stages):
        assert losses(run) == pytest.approx(losses(alone), rel=1e-5), run.name
        assert losses(run, "held_out") == pytest.approx(losses(alone, "held_out"), rel=1e-5), run.name
        ours, theirs = (ckpt.load_weights(ckpt.checkpoints(one)[-1]) for one in (run, alone))
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4, run.name


def test_two_ranks_have_the_losses_of_one(alone: Path, ground: Path, tmp_path: Path) -> None:
    """20 steps in fp32 to 1e-5 relative, at the default stage."""
    equals_one_process(alone, ground, tmp_path, [2])


@pytest.mark.full
def test_two_ranks_have_the_losses_of_one_at_every_stage(alone: Path, ground: Path, tmp_path: Path) -> None:
    equals_one_process(alone, ground, tmp_path, [0, 1, 2, 3])


@pytest.mark.full
def test_two_ranks_continue_to_the_last_bit_at_every_stage(ground: Path, tmp_path: Path) -> None:
    cases = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    jobs = []
    for stage, precision in cases:
        options = {"workers": 2, "zero_stage": stage, "precision": precision, "checkpoint_every": 4}
        for name, steps in (("twice", 4), ("twice", 7), ("once", 7)):
            jobs.append(job(ground, tmp_path / f"{name} {stage} {precision}", recipe(**options, steps=steps)))
    train_on_ranks(jobs, workers=2)
    for stage, precision in cases:
        twice, once = (tmp_path / f"{name} {stage} {precision}" for name in ("twice", "once"))
        assert "continuing from step-000004" in (twice / "log.txt").read_text()
        assert losses(twice) == losses(once), (stage, precision)
        assert len({ckpt.read_model(run / "model")["digest"] for run in (twice, once)}) == 1, (stage, precision)


def test_accumulation_and_streaming_change_nothing(alone: Path, ground: Path, tmp_path: Path) -> None:
    changes = {"batch": {"global_batch": 8, "micro_batch": 2}, "cache_bytes": 0, "zero_stage": 2}
    run = train_here(ground, tmp_path / "run", recipe(**changes, steps=5))
    assert losses(run) == pytest.approx(losses(alone)[:5], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_and_recorded(ground: Path, tmp_path: Path) -> None:
    training = started(ground, tmp_path / "run", recipe(zero_stage=2, steps=4))
    honest = training.batches.micro_batch

    def poisoned(part: Any, following: Any = None) -> Any:
        batch = honest(part, following)
        if training.step == 1:
            batch.latents_BCHW[0] = math.inf
        return batch

    training.batches.micro_batch = poisoned  # type: ignore[method-assign]
    training.run()
    lines = metrics(tmp_path / "run")
    assert [bool(line.get("skipped")) for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    assert lines[1]["grad_norm"] is None
    assert len(lines[1]["bad_uids"]) == 8
    assert all(math.isfinite(line["loss"]) for line in (lines[2], lines[3]))


def test_a_run_that_only_skips_gives_up(ground: Path, tmp_path: Path) -> None:
    training = started(ground, tmp_path / "run", recipe(steps=40))
    honest = training.batches.micro_batch

    def poisoned(part: Any, following: Any = None) -> Any:
        batch = honest(part, following)
        batch.latents_BCHW[:] = math.nan
        return batch

    training.batches.micro_batch = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="20 steps in a row, up to step 20, were not finite"):
        training.run()


def test_a_worker_of_an_earlier_attempt_ends_without_a_word(ground: Path, tmp_path: Path) -> None:
    training = started(ground, tmp_path / "run", recipe(steps=40))
    ckpt.Guard.begin(tmp_path / "run", "the next attempt")
    with pytest.raises(ckpt.SupersededError):
        training.run()
    assert not ckpt.checkpoints(tmp_path / "run")
    stale = job(ground, tmp_path / "run", {**recipe(), "workers": 1}) | {"token": "stale"}
    launch_here("training.loop:run", stale, threads=1)  # says nothing, writes nothing
    assert not ckpt.checkpoints(tmp_path / "run")


def test_distillation_is_the_same_loop(alone: Path, ground: Path, tmp_path: Path) -> None:
    given = recipe(
        objective={"type": "progressive", "steps": 2, "teacher_steps_per_step": 2, "guidance_scale": 2.0},
        steps=6,
        optimizer={"lr": 1e-3},
        model=None,
        resolution=None,
        autoencoder=None,
        text_encoder=None,
    )
    run = train_here(ground, tmp_path / "student", given, kind="distill", teacher=str(alone / "model"))
    assert losses(run)[-1] < losses(run)[0]
    student = ckpt.read_model(run / "model")
    assert student["kind"] == "student"
    assert student["sampling"]["steps"] == 2
    assert student["lineage"]["teacher"] == ckpt.read_model(alone / "model")["digest"]
    assert len(metrics(run, "held_out")) == 1


@pytest.mark.parametrize(("samples", "workers"), [(10, 1), (10, 3), (2, 4), (8, 2)])
def test_every_rank_validates_as_often(samples: int, workers: int) -> None:
    """A forward pass is collective at ZeRO stage 3; what a rank has too much is run and not counted."""
    parts = [list(validation_slices(samples, 4, WorkerContext(rank=rank, workers=workers))) for rank in range(workers)]
    assert len({len(mine) for mine in parts}) == 1
    counted = [index for mine in parts for part, counts in mine if counts for index in part.indexes]
    assert sorted(counted) == list(range(samples))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"size": "tiny", "num_layer": 3}, "did you mean 'num_layers'"),
        ({"sise": "tiny"}, "did you mean 'size'"),
        ({"size": "tiny", "in_channels": 32}, "the autoencoder gives 48"),
        ({"qk_norm": True}, "model.size is missing"),
        ({"size": "huge"}, "model size 'huge' is not known"),
    ],
)
def test_models_that_cannot_be_built(model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model_config(load_recipe({"model": model}), (48, 8, 8), 64)


def started(ground: Path, run: Path, given: dict[str, Any]) -> Training:
    """A run of one process, ready for its first step."""
    from cluster.workers import _group_of_one
    from training.loop import Job

    config = job(ground, run, {**given, "workers": 1})
    with _group_of_one("cpu"):
        return Training(Job(**{**config, "models": tuple(config["models"])}), WorkerContext())
