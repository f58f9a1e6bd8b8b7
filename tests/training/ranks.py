"""Runs training on several ranks as plain processes over gloo: what Ray Train does, without waiting for Ray.

train_on_ranks(config, workers=2)          # config as training.loop.Job takes it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def job(root: Path, run: Path, recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A job on the snapshot and text encoder under `root`, and its run folder made ready for one more attempt."""
    from training.checkpoint import Guard
    from training.recipe import load_recipe

    run.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    Guard.begin(run, token)
    return {
        "kind": "train",
        "recipe": load_recipe(recipe).plain(),
        "snapshot": str(root / "snapshot"),
        "run": str(run),
        "run_id": "test",
        "token": token,
        "models": [str(root)],
        **changes,
    }


def start_ranks(jobs: list[dict[str, Any]], workers: int) -> list[subprocess.Popen[str]]:
    """One process a rank, already running; each does all the jobs, one after the other."""
    store = tempfile.mktemp(prefix="ranks-")
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
    }
    return [
        subprocess.Popen(
            [sys.executable, __file__, store, json.dumps(jobs)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]


def train_on_ranks(jobs: list[dict[str, Any]], workers: int, timeout: float = 500) -> None:
    """Train to the end of every job. Raises AssertionError with what the failing rank printed."""
    processes = start_ranks(jobs, workers)
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    assert not failed, f"rank {failed[0]} of {workers} ended with {processes[failed[0]].returncode}:\n{said[failed[0]]}"


def metrics(run: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def losses(run: Path, split: str = "train") -> list[float]:
    return [line["loss"] for line in metrics(run, split)]


def main(store: str, jobs: list[dict[str, Any]]) -> None:
    import torch
    import torch.distributed as dist

    from cluster.workers import WorkerContext
    from training.checkpoint import Guard
    from training.loop import run

    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, workers), rank=rank, world_size=workers)
    for config in jobs:
        if rank == 0:  # several jobs may go on with one run: each is an attempt of its own
            Guard.begin(Path(config["run"]), config["token"])
        dist.barrier()
        run(config, WorkerContext(rank=rank, workers=workers, local_rank=rank))
        dist.barrier()
    assert "ray" not in sys.modules, "the loop imported ray"


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
