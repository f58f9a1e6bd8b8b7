"""Training workers on a real Ray Train: they meet, fail with a sentence, start again; nothing shadows them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.workers import WorkersFailedError, launch, launch_here

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable_on_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe below is no installed module: Ray's processes find it as this one does."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def test_workers_meet_and_nothing_in_the_working_directory_shadows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training.py").write_text("raise RuntimeError('the user\\'s own training.py was imported')")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text("raise RuntimeError('the user\\'s own stages was imported')")
    monkeypatch.chdir(tmp_path)
    launch("tests.cluster.probe:meet", {"folder": str(tmp_path)}, workers=2, name="a b", storage="ray")
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(one["rank"], one["workers"], one["device"]) for one in seen] == [(0, 2, "cpu"), (1, 2, "cpu")]
    assert [one["sum"] for one in seen] == [3.0, 3.0]
    assert {(one["threads"], one["accelerator"]) for one in seen} == {("1", "cpu")}
    for one in seen:
        assert all(module.startswith(str(REPOSITORY)) for module in one["modules"])
        assert str(tmp_path) not in one["path"]


@pytest.mark.full
def test_a_mistake_ends_with_its_sentence_and_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lr is -1: write a rate above 0"):
        launch(
            "tests.cluster.probe:meet",
            {"folder": str(tmp_path), "mistake": 1},
            workers=2,
            name="mistake",
            storage=tmp_path / "ray",
            restarts=3,
        )
    assert (tmp_path / "attempts-1").read_text() == "1"


@pytest.mark.full
def test_a_group_whose_worker_died_is_started_again(tmp_path: Path) -> None:
    options = {"workers": 2, "storage": tmp_path / "ray"}
    launch("tests.cluster.probe:meet", {"folder": str(tmp_path), "breaks": 0}, name="again", restarts=1, **options)  # type: ignore[arg-type]
    assert (tmp_path / "rank-1.json").exists()
    assert (tmp_path / "attempts-0").read_text() == "2"
    (tmp_path / "attempts-0").unlink()
    with pytest.raises(WorkersFailedError, match="worker 0 failed: a worker died"):
        launch("tests.cluster.probe:meet", {"folder": str(tmp_path), "breaks": 0}, name="once", **options)  # type: ignore[arg-type]


def test_more_workers_than_there_are_cpus_are_made_room_for_or_refused(tmp_path: Path) -> None:
    """On a session of our own logical CPUs follow the workers; with GPUs there is nothing to make up."""
    with pytest.raises(ValueError, match="workers is 2, each on a GPU of its own, but the Ray cluster has 0"):
        launch("tests.cluster.probe:meet", {}, workers=2, name="gpu", storage=tmp_path / "ray", device="cuda")


def test_one_worker_without_ray_leaves_the_environment_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before = dict(os.environ)
    for _ in range(2):
        launch_here("tests.cluster.probe:meet", {"folder": str(tmp_path)})
    assert json.loads((tmp_path / "rank-0.json").read_text())["sum"] == 1.0
    assert dict(os.environ) == before
