"""Where a plan's work is carried out: Ray Data, or this one process, behind one interface.

    with open_engine("ray", workers=4) as engine:
        for result in engine.map(Worker, config, tasks):
            ...

`map` gives every task (a JSON object that describes whole input shards) to a worker that was built once from `config`
and yields the results as they come, in any order. Only descriptions and summaries travel: workers read encoded bytes
from storage and commit what they find there themselves, so nothing that grows with the data passes through the driver
or the object store, and a task that is run twice (a worker died) leaves what one run leaves. `call` runs one function
away from the driver.

Ray puts the driver's working directory first on its workers' path, where a user's own `stages/` or `training.py` may
lie; an empty working directory in the runtime environment keeps them out. Addresses must therefore be absolute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

# A worker is a class built once from a JSON config and called with one JSON task at a time.
WorkerClass = Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]


class Engine(Protocol):
    """Runs workers over tasks. `workers` is how many run side by side."""

    name: str
    workers: int

    def map(
        self, worker: WorkerClass, config: dict[str, Any], tasks: list[dict[str, Any]], *, gpus: float = 0.0
    ) -> Iterator[dict[str, Any]]: ...

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any: ...


class LocalEngine:
    """Everything in this process, one task after the other."""

    name = "local"
    workers = 1

    def map(
        self, worker: WorkerClass, config: dict[str, Any], tasks: list[dict[str, Any]], *, gpus: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        if tasks:
            run = worker(config)
            yield from map(run, tasks)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class RayEngine:
    """Ray Data: a pool of actors, each with its weights loaded once, fed with one task at a time."""

    name = "ray"

    def __init__(self, workers: int) -> None:
        import ray

        available = int(ray.cluster_resources().get("CPU", 1))
        self.workers = min(workers, available) if workers else available

    def map(
        self, worker: WorkerClass, config: dict[str, Any], tasks: list[dict[str, Any]], *, gpus: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        if not tasks:
            return
        import ray

        size = min(self.workers, len(tasks))
        # One task a block: a block is what Ray hands out and what it runs again when a worker dies.
        rows = [{"task": json.dumps(task)} for task in tasks]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayWorker,
            fn_constructor_args=(worker, config),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=gpus or None,
        )
        try:
            for row in dataset.iter_rows():
                yield json.loads(row["result"])
        except Exception as error:
            # A user's mistake that only a worker could find is told like any other, not as a remote traceback.
            if (mistake := _mistake_behind(error)) is not None:
                raise mistake from None
            raise

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        import ray

        return ray.get(ray.remote(num_cpus=1, max_retries=3)(function).remote(*arguments))


def _mistake_behind(error: BaseException) -> ValueError | FileNotFoundError | None:
    """The ValueError or FileNotFoundError that a worker raised, if that is what ended the run."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        for found in (cause, seen):
            if isinstance(found, ValueError | FileNotFoundError):
                # Ray's own wrappers inherit from what they wrap; only the plain error has the plain sentence.
                plain = next((kind for kind in type(found).__mro__ if kind.__module__ == "builtins"), ValueError)
                return plain(str(cause if cause is not None else found))  # type: ignore[return-value]
        seen = seen.__cause__ or seen.__context__
    return None


class _RayWorker:
    """What Ray Data builds on an actor: the worker itself, spoken to in JSON."""

    def __init__(self, worker: WorkerClass, config: dict[str, Any]) -> None:
        self.run = worker(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self.run(json.loads(task))) for task in batch["task"]]}


@contextlib.contextmanager
def open_engine(kind: str, workers: int = 0) -> Iterator[Engine]:
    """A "local" or "ray" engine. Ray joins the cluster of RAY_ADDRESS if that is set, else starts one for this run."""
    if kind == "local":
        yield LocalEngine()
        return
    with ray_session(workers):
        yield RayEngine(workers)


@contextlib.contextmanager
def ray_session(cpus: int = 0) -> Iterator[None]:
    """A Ray session of our own (or the cluster of RAY_ADDRESS), ended when the block ends.

    cpus: logical CPUs of an own session; 0 takes the machine's.
    """
    _quiet_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address and not any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        # Ray would keep a token in the home folder, and die without a word where that changes or cannot be written.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="sluice-empty-") as empty:
        own: dict[str, Any] = {} if address else {"num_cpus": cpus or os.cpu_count(), "include_dashboard": False}
        # "local" keeps a second run on this machine from joining the first one's session by accident.
        ray.init(
            address=address or "local",
            runtime_env={"working_dir": empty, "env_vars": {"OMP_NUM_THREADS": str(_threads_each(cpus))}},
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **own,
        )
        quiet_ray_data()
        try:
            yield
        finally:
            ray.shutdown()


def _threads_each(workers: int) -> int:
    """Threads a worker may use so that all of them together fill the machine once."""
    return max(1, (os.cpu_count() or 1) // (workers or os.cpu_count() or 1))


def _quiet_ray() -> None:
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        # A busy machine takes longer than the default 30 s to start the first process.
        "RAY_gcs_server_port_wait_time_s": "120",
    }.items():
        os.environ.setdefault(name, value)


def quiet_ray_data() -> None:
    """No progress bars and no chatter of Ray Data's own: the runner reports rows and rates itself."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)


def chunked(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` consecutive items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
