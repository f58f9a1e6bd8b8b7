"""Whole evaluations with small models: the same result however it was interrupted, and everything asked for in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.demo.world import make_world
from pipelines.recipe import load_recipe
from pipelines.runner import SHIPPED_MODELS
from pipelines.runner import Options as CurateOptions
from tests.training.evaluation.painters import write_painter, write_peer
from training.evaluation import work
from training.evaluation.made_up import made_up_suite
from training.evaluation.run import Options, evaluate, named_painters
from training.evaluation.suites import Prompt, Suite, read_suite

RECIPE = {
    "stages": {"decode": {}, "clip": {"type": "clip_score", "model": "clip"}},
    "rules": {
        "sharp": {"column": "decode.short_side", "at_least": 32},
        "clip_score": {"column": "clip.score", "at_least": 0.1},
    },
    "held_out": {"fraction": 0.4},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with curated/ (a snapshot that the shipped CLIP filtered), and the models a and b, a having seen it."""
    from pipelines.runner import curate

    root = tmp_path_factory.mktemp("evaluated")
    make_world(root / "world", scenes=170, seed=3)
    recipe = load_recipe({"input": {"url": f"{root}/world/*.tar"}, **RECIPE})
    options = CurateOptions(output=str(root / "curated"), engine="local", models=(str(SHIPPED_MODELS),), quiet=True)
    snapshot = curate(recipe, options)
    write_painter(root / "a", seed=0, lineage={"snapshot": snapshot.id, "teacher": None})
    write_painter(root / "b", seed=1)
    return root


def _options(output: Path, **changes: Any) -> Options:
    said: dict[str, Any] = {
        "output": str(output), "suites": (made_up_suite(2),), "pictures": 56, "memorised": 8, "engine": "local",
        "models": (str(SHIPPED_MODELS),), "answerer": "made_up", "quiet": True, "speed_repeats": 1,
    }  # fmt: skip
    return Options(**{**said, **changes})


@pytest.fixture(scope="module")
def whole(ground: Path) -> tuple[Path, dict[str, Any]]:
    output = ground / "whole"
    return output, evaluate([str(ground / "a"), str(ground / "b")], str(ground / "curated"), _options(output))


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to the digit: everything but how long drawing took."""
    return {key: value for key, value in result.items() if key not in ("speed", "verdict")}


def test_every_figure_has_its_protocol_and_an_interval_or_a_reason(whole: tuple[Path, dict[str, Any]]) -> None:
    _, result = whole
    names = {metric["name"] for metric in result["metrics"]}
    assert {"right", "object", "count", "colour", "position", "clip", "aesthetic", "questions"} <= names
    assert {"kid CLIP features", "precision CLIP features", "recall CLIP features", "diversity CLIP features"} <= names
    for metric in result["metrics"]:
        assert metric["protocol"]
        assert set(metric["values"]) == {"a", "b"}
        for one in metric["values"].values():
            assert one["method"]
            assert one["low"] is not None or one["note"]
            assert one["low"] is None or one["low"] <= one["value"] <= one["high"]
    right = next(metric for metric in result["metrics"] if metric["name"] == "right")
    assert right["values"]["a"]["samples"] == len(made_up_suite(2).prompts)
    assert {"first": "a", "second": "b"}.items() <= right["differences"][0].items()
    assert {"single", "count six", "zero", "negation"} <= set(result["categories"])
    assert result["schema_version"] == "1.0"
    assert any("FID" in one["what"] and "--small-sample" in one["why"] for one in result["not_measured"])
    assert [step["steps"] for step in result["speed"][0]["by_steps"]] == [1, 2]
    assert result["speed"][0]["weights_bytes"] > 10_000


def test_a_judge_that_filtered_the_data_is_marked(whole: tuple[Path, dict[str, Any]]) -> None:
    _, result = whole
    judge = {metric["name"]: metric["judge"] for metric in result["metrics"]}
    assert judge["clip"]["independent"] == {"a": False, "b": True}
    assert "filtered snapshot" in judge["clip"]["why"]
    assert judge["aesthetic"]["independent"] == {"a": False, "b": True}  # its head stands on that CLIP
    assert judge["right"]["independent"] == {"a": True, "b": True}


def test_contamination_and_copies_are_counted(whole: tuple[Path, dict[str, Any]]) -> None:
    _, result = whole
    a, b = result["contamination"]["a"], result["contamination"]["b"]
    assert a["problem"] == ""
    assert a["of_prompts"] == len(made_up_suite(2).prompts)
    assert (a["pictures"], a["of_pictures"] > 20) == (0, True)  # held out: training never saw them
    assert "not known" in b["problem"]
    assert result["memorisation"]["by_model"]["a"]["value"] == 0
    assert result["memorisation"]["false_alarms"]["samples"] > 20


def test_an_interrupted_evaluation_draws_nothing_twice_and_ends_the_same(
    ground: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, drawn = ground / "interrupted", []
    real, fail_after = work.Worker._draw, 3

    def counted(self: work.Worker, task: dict[str, Any], path: str) -> None:
        if len(drawn) == fail_after:
            raise KeyboardInterrupt
        real(self, task, path)
        drawn.append(task["unit"])

    monkeypatch.setattr(work.Worker, "_draw", counted)
    addresses = [str(ground / "a"), str(ground / "b")]
    with pytest.raises(KeyboardInterrupt):
        evaluate(addresses, str(ground / "curated"), _options(output))
    assert not (output / "evaluation.json").exists()
    fail_after = 10_000
    result = evaluate(addresses, str(ground / "curated"), _options(output))
    assert len(drawn) == len(set(drawn)) == len(list((output / "drawings").glob("*.parquet")))
    assert _figures(result) == _figures(whole[1])
    # A third time nothing is left to do, and the file is the same to the byte.
    before = (output / "evaluation.json").read_bytes()
    evaluate(addresses, str(ground / "curated"), _options(output))
    assert (output / "evaluation.json").read_bytes() == before
    assert json.loads((output / "provenance.json").read_text())["drawn"] == 0


def test_another_stage_looks_again_and_draws_nothing(ground: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    output, _ = whole
    drawings = {path: path.stat().st_mtime_ns for path in (output / "drawings").iterdir()}
    changed = _options(output, judges=(("hpsv2", "clip"),), small_sample=True)
    result = evaluate([str(ground / "a"), str(ground / "b")], str(ground / "curated"), changed)
    assert {path: path.stat().st_mtime_ns for path in (output / "drawings").iterdir()} == drawings
    assert result["elo"][0]["source"] == "pairs decided by hpsv2"
    assert sum(one["won"] for one in result["elo"][0]["standings"]) > 0
    assert sum(one["elo"] for one in result["elo"][0]["standings"]) == pytest.approx(2000)


def test_it_is_recorded_in_lineage(ground: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    from pipelines.lineage.catalog import open_catalog
    from pipelines.lineage.questions import trace

    catalog = f"sqlite:///{ground}/catalog.db"
    evaluate([str(ground / "a"), str(ground / "b")], str(ground / "curated"), _options(whole[0], catalog=catalog))
    from stages.contract import digest_of

    result = json.loads((whole[0] / "evaluation.json").read_text())
    found = trace(open_catalog(catalog), digest_of(result))
    assert {one.kind for one in found.artifacts.values()} == {"evaluation", "snapshot", "model"}
    assert len(found.of_kind("model")) == 2


def test_steps_can_be_compared_and_the_same_model_twice_is_refused(ground: Path) -> None:
    found = named_painters([str(ground / "a"), f"{ground / 'a'}@steps=1,guidance_scale=2.0"])
    assert [one["name"] for one in found] == ["a", "a@steps=1,guidance_scale=2.0"]
    assert found[1]["sampling"] == {**found[0]["sampling"], "steps": 1, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match="given twice"):
        named_painters([str(ground / "a"), str(ground / "a")])


def test_a_peer_in_diffusers_format_is_compared(ground: Path, tmp_path: Path) -> None:
    from tests.training.small import write_text_encoder

    peer = write_peer(tmp_path / "peer", write_text_encoder(tmp_path / "text_encoder"))
    suite = Suite("mine", "user", (Prompt("a wide red bar", "mine"), Prompt("a tall blue bar", "mine")))
    options = _options(
        tmp_path / "out", suites=(suite,), pictures=0, memorised=0, detector="", answerer="", aesthetic=""
    )
    spec = f"{peer}@steps=2,height=64,width=64"
    result = evaluate([spec, str(ground / "a")], str(ground / "curated"), options)
    assert result["models"][0]["kind"] == "peer"
    (clip,) = result["metrics"]
    assert set(clip["values"]) == {"peer@steps=2,height=64,width=64", "a"}


def test_bias_is_audited(ground: Path, tmp_path: Path) -> None:
    from training.evaluation.bias import read_templates

    (tmp_path / "t.yaml").write_text(
        "templates: ['a {shape}']\nfill: {shape: [circle, square]}\ndraw: 3\nopen: colour\nof: [red, blue]\n"
    )
    suite = read_templates(tmp_path / "t.yaml")
    assert [prompt.text for prompt in suite.prompts] == ["a circle"] * 3 + ["a square"] * 3
    options = _options(tmp_path / "out", suites=(suite,), pictures=0, memorised=0, answerer="")
    result = evaluate([str(ground / "a")], str(ground / "curated"), options)
    assert [one["prompt"] for one in result["bias"]] == ["a circle", "a square"]
    assert all(one["by_model"]["a"]["without"] <= 3 for one in result["bias"])


def test_unsafe_drawings_are_counted(ground: Path, tmp_path: Path) -> None:
    """A head that calls a picture unsafe by the sign of one direction of the embedding: the share is that of signs."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from cluster.storage import Folder

    direction = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    save_file({"0.weight": 50 * direction, "0.bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    options = _options(
        tmp_path / "out", pictures=0, memorised=0, answerer="", safety=str(tmp_path / "head.safetensors")
    )
    result = evaluate([str(ground / "a")], str(ground / "curated"), options)
    unsafe = next(metric for metric in result["metrics"] if metric["name"] == "unsafe")
    assert unsafe["better"] == "lower"
    store = Folder(tmp_path / "out")
    measured = [work.read_measure(store, one.path)[0] for one in store.files("measures")]
    embeddings = [e for values in measured for e in values.get("image_embedding", ())]
    expected = np.mean([float(e @ direction[0].numpy()) >= 0 for e in embeddings])
    assert unsafe["values"]["a"]["value"] == pytest.approx(expected)


def test_a_guard_is_audited(ground: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("gore\n")
    suite = Suite("mine", "user", (Prompt("a red circle", "mine"),))
    options = _options(
        tmp_path / "out", suites=(suite,), pictures=0, memorised=0, answerer="", guard=str(tmp_path / "words.txt"),
        benign=("a red circle", "a gorey tale"), unsafe=("gore on a wall",),
    )  # fmt: skip
    result = evaluate([str(ground / "a")], str(ground / "curated"), options)
    assert (result["safety"]["caught"]["value"], result["safety"]["false_alarms"]["value"]) == (1, 0)
    assert result["safety"]["bypass"]["invisible characters"]["value"] == 0
    assert result["safety"]["bypass"]["digits for letters"]["value"] == 1


def test_real_prompt_files_run_end_to_end(ground: Path, shared_data: Path, tmp_path: Path) -> None:
    geneval = read_suite(shared_data / "prompts/geneval/prompts/evaluation_metadata.jsonl").first(8)
    parti = read_suite(shared_data / "prompts/parti/PartiPrompts.tsv").first(8)
    options = _options(tmp_path / "out", suites=(geneval, parti), pictures=0, memorised=0, answerer="")
    result = evaluate([str(ground / "a"), str(ground / "b")], str(ground / "curated"), options)
    assert [metric["name"] for metric in result["metrics"]] == ["clip", "aesthetic"]
    assert any(one["what"] == "prompts drawn right" for one in result["not_measured"])


@pytest.mark.full
@pytest.mark.timeout(500)
def test_two_thousand_drawings_killed_on_ray_and_started_again_end_as_in_one_process(
    ground: Path, ray_temp: Path
) -> None:
    output = ground / "killed"
    command = [
        str(Path(sys.executable).parent / "sluice"), "evaluate", str(ground / "a"), str(ground / "b"), "--data",
        str(ground / "curated"), "--output", str(output), "--suite", "made_up", "--limit", "64", "--pictures", "936",
        "--memorised", "0", "--workers", "2", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while len(list((output / "drawings").glob("*.parquet"))) < 30 and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "drawings").glob("*.parquet")}
    assert 30 <= len(kept) < 100  # of 126 units, 63 a model
    subprocess.run(command, check=True, capture_output=True, timeout=400)
    after = {path.name: path.stat().st_mtime_ns for path in (output / "drawings").glob("*.parquet")}
    assert kept.items() <= after.items()  # what was drawn was not drawn again
    rows = {name: pq.read_metadata(output / "drawings" / name).num_rows for name in after}
    assert sum(rows.values()) == 2000
    drawn = json.loads((output / "provenance.json").read_text())["drawn"]
    assert drawn == sum(count for name, count in rows.items() if name not in kept)
    once = [*command, "--local"]
    once[once.index(str(output))] = str(ground / "once")
    subprocess.run(once, check=True, capture_output=True, timeout=400)
    found, expected = (json.loads((at / "evaluation.json").read_text()) for at in (output, ground / "once"))
    assert _figures(found) == _figures(expected)
