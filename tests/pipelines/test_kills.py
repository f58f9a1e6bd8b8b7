"""A worker killed outright in the middle of a run on Ray: the snapshot of a run that was left alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

import pipelines.runner as runner_module
from pipelines import barriers
from pipelines.recipe import load_recipe
from pipelines.runner import Options, curate
from tests.pipelines import raw


class Killer(threading.Thread):
    """Kills one working Ray process below this one at each moment: as soon as so many files match a pattern."""

    def __init__(self, folder: Path, moments: list[tuple[str, int]]) -> None:
        super().__init__(daemon=True)
        self.folder, self.moments, self.killed = folder, moments, 0
        self.ended = threading.Event()

    def run(self) -> None:
        for pattern, count in self.moments:
            while len(list(self.folder.glob(pattern))) < count:
                if self.ended.wait(0.02):
                    return
            while not self.kill_one():
                if self.ended.wait(0.02):
                    return

    def kill_one(self) -> bool:
        for child in psutil.Process().children(recursive=True):
            try:
                title = " ".join(child.cmdline())
                # The actors of the run itself: Ray does not outlive the loss of its own agents.
                if title.startswith("ray::") and "MapBatches" in title:
                    child.kill()
                    self.killed += 1
                    return True
            except psutil.NoSuchProcess:
                continue
        return False


@pytest.mark.parametrize(
    "moments",
    [
        [("units/decode-*/*.parquet", 1), ("units/decode-*/*.parquet", 4)],
        pytest.param([("units/judge/*/home-*.json", 1), ("units/judge/*/solve-*.json", 1)], marks=pytest.mark.full),
    ],
    ids=["measuring", "judging"],
)
def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path, monkeypatch, ray_temp, moments):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    url = raw.write_world(tmp_path / "raw", shards=8, rows=40)
    recipe = load_recipe({**raw.RECIPE, "input": {"url": url}})
    whole = curate(recipe, Options(str(tmp_path / "whole"), engine="local", quiet=True, report=False))
    if "judge" in moments[0][0]:
        monkeypatch.setattr(barriers, "PART_ROWS", 200)
        monkeypatch.setattr(runner_module, "SMALL_INPUT_BYTES", 0)
    killer = Killer(tmp_path / "killed", moments)
    killer.start()
    began = time.monotonic()
    snapshot = curate(recipe, Options(str(tmp_path / "killed"), engine="ray", workers=2, quiet=True, report=False))
    killer.ended.set()
    killer.join()
    assert killer.killed > 0, f"the run of {time.monotonic() - began:.0f} s was over before a worker could be killed"
    assert snapshot.id == whole.id
