"""Training workers: several processes that hold a process group together, on Ray Train or as this one process.

    launch("training.loop:run", config, workers=4, name="tiny", storage=run_folder)       # Ray Train
    launch_here("training.loop:run", config)                                              # one worker, no Ray

The function is named, not pickled, and gets `(config, WorkerContext)`: plain data, and the few things it may ask of
whoever launched it. So the code that trains imports no Ray, and the same function runs under torchrun or in a test.

Workers find an empty folder where Ray would put the driver's working directory first on their path, so that a user's
own `training.py` or `stages/` shadows nothing; every path in `config` must therefore be absolute. Where several runs
share a machine each starts a Ray session of its own; RAY_ADDRESS joins a cluster instead.

A worker that dies takes its group with it; Ray starts the group again up to `restarts` times, and the function
continues from what it wrote itself. A mistake of the user's (ValueError) is not tried again: it ends the run with its
sentence.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FATAL_FILE = "mistake.json"


def _silent(metrics: Mapping[str, Any]) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class WorkerContext:
    """What a worker knows of its group. The process group (torch.distributed) stands when the function is called.

    device: "cpu" or "cuda:N". report: tells the launcher some metrics; collective, the same number of calls on every
    rank.
    """

    rank: int = 0
    workers: int = 1
    local_rank: int = 0
    device: str = "cpu"
    report: Callable[[Mapping[str, Any]], None] = field(default=_silent)


class WorkersFailedError(RuntimeError):
    """The workers ended with an error that is not the user's, more often than restarts were allowed."""


def launch(
    function: str,
    config: Mapping[str, Any],
    *,
    workers: int,
    name: str,
    storage: str | os.PathLike[str],
    device: str = "cpu",
    threads: int = 1,
    restarts: int = 0,
) -> None:
    """Run `function` ("module:name") on `workers` Ray Train workers and wait for it.

    name and storage (a folder that every node sees) are Ray's for this run and stay the same when it is run again.
    threads: of each worker's tensor library. Raises ValueError with the worker's own sentence for a user's mistake, and
    WorkersFailedError for anything else.
    """
    from cluster.engine import ray_session

    gpu = device.startswith("cuda")
    folder = Path(storage).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FATAL_FILE).unlink(missing_ok=True)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cuda" if gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    _quiet_train()
    with ray_session(max(workers, os.cpu_count() or 1)):
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        _enough_resources(workers, gpu)
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"function": function, "config": dict(config), "folder": str(folder), "gpu": gpu},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})}
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the API before V2
                name=re.sub(r"[^\w.-]", "-", name),
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(max_failures=restarts),
                worker_runtime_env={"env_vars": environment},
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            mistake = folder / FATAL_FILE
            if mistake.exists():
                raise ValueError(json.loads(mistake.read_text())["message"]) from None
            if not type(error).__module__.startswith("ray"):
                raise
            raise WorkersFailedError(_first_cause(error)) from error


def launch_here(function: str, config: Mapping[str, Any], *, device: str = "cpu", threads: int = 0) -> None:
    """Run `function` as the only worker, in this process and without Ray. threads 0: as torch has them."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    with _group_of_one(device):
        _named(function)(dict(config), WorkerContext(device="cuda:0" if device == "cuda" else device))


@contextmanager
def _group_of_one(device: str) -> Iterator[None]:
    import torch.distributed as dist

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # DeepSpeed asks for them; the store below needs neither
    before = {variable: os.environ.get(variable) for variable in alone}
    os.environ.update(alone)
    # Not taken down afterwards: DeepSpeed keeps the groups that it derives from this one for as long as the process
    # lives.
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


def _named(function: str) -> Callable[[dict[str, Any], WorkerContext], None]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _ray_worker(payload: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import ray.train

    mistake = Path(payload["folder"]) / FATAL_FILE
    if mistake.exists():  # a restart after a mistake would only make it again
        raise RuntimeError(json.loads(mistake.read_text())["message"])
    ray_context = ray.train.get_context()
    local_rank = ray_context.get_local_rank()
    context = WorkerContext(
        rank=ray_context.get_world_rank(),
        workers=ray_context.get_world_size(),
        local_rank=local_rank,
        device=f"cuda:{_visible_gpu()}" if payload["gpu"] else "cpu",
        report=lambda metrics: ray.train.report(dict(metrics)),
    )
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        _named(payload["function"])(payload["config"], context)
    except ValueError as error:
        mistake.write_text(json.dumps({"message": str(error), "rank": context.rank}))
        raise


def _visible_gpu() -> int:
    import ray.train.torch

    return ray.train.torch.get_device().index or 0


def _enough_resources(workers: int, gpu: bool) -> None:
    """Refuse at once what Ray would wait for without end."""
    import ray

    have = ray.cluster_resources()
    for kind in ("GPU", "CPU") if gpu else ("CPU",):
        if have.get(kind, 0) < workers:
            raise ValueError(
                f"workers is {workers}, each on a {kind} of its own, but the Ray cluster has {have.get(kind, 0):.0f}: "
                f"set workers to at most that, or point RAY_ADDRESS to a larger cluster"
            )


def _quiet_train() -> None:
    """Ray Train's own chatter off: the loop reports what a person wants to know."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")


def _first_cause(error: BaseException) -> str:
    """One line of what went wrong on the worker that failed first."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = min(failures.items())
        return f"worker {rank} failed: {str(cause).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
