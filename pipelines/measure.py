"""The worker that measures: one shard in, one Parquet file a stage out, each a finished unit of work.

A task names a shard, where its units lie and which of them are still to be made. The worker streams the shard's
samples once; every cheap stage of the pass sees the same decoded picture, and pixels are let go after each transport
batch. A model stage (compute_batch > 0) sees the shard's measured rows in order, in batches of its own size, whatever
the transport batch. While a model computes one batch in a thread of its own, the rows of the next ones are read here
and made ready in others: which thread does what decides nothing about the numbers.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Folder
from pipelines.readers import InputShard, Sample, read
from stages.contract import Batch, Column, Columns, Context, LazyImage, Measure, PreparedMeasure, Stage
from stages.decode import EncodedImage, PixelBudget, sniff

ROWS_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("image_id", pa.string()),
        ("index", pa.int64()),
        ("key", pa.string()),
        ("member", pa.string()),
        ("source_uid", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("alternatives", pa.list_(pa.string())),
        ("sha256", pa.string()),
        ("size_bytes", pa.int64()),
        ("ext", pa.string()),
        ("metadata", pa.string()),
        ("error", pa.string()),
    ]
)
# Batches of a model that wait, ready or nearly so, behind the one it computes.
BATCHES_AHEAD = 2
# Threads that make rows ready for a model on an accelerator; beside a model on the CPU there is one.
MOST_PREPARING_THREADS = 8
# Encoded bytes that one portion of samples may hold, whatever the transport batch.
TRANSPORT_BYTES = 64 << 20
# Reader columns that stages and rules may name without a stage before them.
READER_COLUMNS = (*ROWS_SCHEMA.names, "shard", "image")


def arrow_type(text: str) -> pa.DataType:
    """The Arrow type of a column's spelling in `stages.contract.Column`."""
    kind, bracket, size = text.rstrip("]").partition("[")
    if bracket and kind == "fixed_binary":
        return pa.binary(int(size))
    if bracket:
        return pa.list_(arrow_type(kind), int(size) if size else -1)
    return pa.type_for_alias(kind)


def identify(sample: Sample) -> tuple[str, str | None, str | None]:
    """(uid, image_id, sha256 of the image bytes) of a sample: content alone, neither position nor name."""
    caption = hashlib.sha256((sample.caption or "").encode("utf-8", "surrogatepass")).hexdigest()
    if sample.data is None:
        # A row without bytes is known by its URL and caption, in a domain of its own.
        url = hashlib.sha256((sample.url or "").encode("utf-8", "surrogatepass")).hexdigest()
        return _id("sluice1-no-bytes", url, caption), None, None
    image = hashlib.sha256(sample.data).hexdigest()
    return _id("sluice1", image, caption), image[:32], image


def _id(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@dataclass
class StageJob:
    """One stage of a pass as workers get it: the description and the name of its instance in the recipe."""

    name: str
    stage: Stage

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(self.stage.adds)

    def to_json(self) -> dict[str, Any]:
        kind = type(self.stage)
        return {"name": self.name, "class": f"{kind.__module__}:{kind.__qualname__}", "options": asdict(self.stage)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StageJob:
        module, _, name = value["class"].partition(":")
        kind = getattr(importlib.import_module(module), name)
        # Lists back to tuples: JSON has no tuples, and options are never lists.
        options = {
            key: tuple(option) if isinstance(option, list) else option for key, option in value["options"].items()
        }
        return cls(value["name"], kind(**options))


@dataclass
class _Gathered:
    """One stage's answers for a shard, row by row, the rows waiting for its next batch, and batches on their way."""

    job: StageJob
    values: dict[str, list[Any]]
    errors: list[str | None] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    known: dict[str, list[Any]] | None = None
    under_way: deque[tuple[list[int], Future[Columns]]] = field(default_factory=deque)


class MeasureWorker:
    """Opens the stages of a pass once and measures shards with them. Config and tasks are JSON."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.store = Folder(config["store"])
        self.context = Context(tuple(config["models"]), config["device"], config.get("cache", ""))
        self.transport_batch: int = config["transport_batch"]
        self.jobs = [StageJob.from_json(job) for job in config["jobs"]]
        self.opened: dict[str, Measure] = {}
        # Threads start when first given something to do: a worker of cheap measures has none but its own.
        threads = 1 if self.context.device == "cpu" else min(MOST_PREPARING_THREADS, os.cpu_count() or 1)
        self.preparing = ThreadPoolExecutor(threads, "prepare")
        self.computing = ThreadPoolExecutor(1, "compute")

    def measure_of(self, job: StageJob) -> Measure:
        if job.name not in self.opened:
            self.opened[job.name] = job.stage.open(self.context)
        return self.opened[job.name]

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Make the task's missing units. Returns the shard's rows and seconds."""
        started = time.perf_counter()
        shard = InputShard.from_json(task["shard"])
        todo = [job for job in self.jobs if job.name in task["todo"]]
        gates = self._gates(task)
        has_rows = self.store.exists(task["rows"])
        rows = pq.read_table(self.store.open(task["rows"])) if has_rows else None
        first = [job for job in todo if not _stage_columns(job)]
        if rows is None or any("image" in job.stage.needs for job in first):
            rows = self._stream(shard, first, rows, gates, task)
        else:
            self._from_columns(rows, first, {}, gates, task)
        # Stages that need another stage's columns read them from its finished unit.
        for job in todo:
            if needed := _stage_columns(job):
                self._from_columns(rows, [job], self._load(task, needed), gates, task)
        spent = self._spent(todo)
        return {
            "shard": task["digest"],
            "rows": rows.num_rows,
            "seconds": time.perf_counter() - started,
            "spent": spent,
        }

    def _spent(self, jobs: Sequence[StageJob]) -> dict[str, float]:
        """What costly stages have spent since they were last asked (requests, tokens, money), by name."""
        spent: dict[str, float] = {}
        for job in jobs:
            counts = getattr(self.opened.get(job.name), "spent", {})
            for name, value in counts.items():
                spent[name] = spent.get(name, 0) + value
                counts[name] = 0.0
        return spent

    def _gates(self, task: dict[str, Any]) -> list[str | None] | None:
        """For each row, why it is not to be measured in this pass, or None."""
        if not task.get("gate"):
            return None
        return pq.read_table(self.store.open(task["gate"]), columns=["gate"])["gate"].to_pylist()

    def _load(self, task: dict[str, Any], needed: Sequence[str]) -> dict[str, Sequence[Any]]:
        columns: dict[str, Sequence[Any]] = {}
        for name in needed:
            instance, _, column = name.partition(".")
            table = pq.read_table(self.store.open(task["units"][instance]), columns=[column])
            columns[name] = table[column].to_pylist()
        return columns

    def _stream(
        self,
        shard: InputShard,
        jobs: list[StageJob],
        rows: pa.Table | None,
        gates: list[str | None] | None,
        task: dict[str, Any],
    ) -> pa.Table:
        """One pass over the shard's bytes: write its rows if that is still to be done, and feed the stages."""
        gathered = [self._gather(job, task) for job in jobs]
        described: list[dict[str, Any]] = []
        index = 0
        pending: dict[int, tuple[dict[str, Any], EncodedImage]] = {}
        for samples in _portions(read(shard), self.transport_batch):
            budget = PixelBudget()
            for sample in samples:
                row = _describe(sample, index)
                if rows is None:
                    described.append(row)
                pending[index] = (row, EncodedImage(sample.data, sample.error or sample.absent, budget=budget))
                index += 1
            for part in gathered:
                self._take(part, pending, range(index - len(samples), index), gates, task["digest"])
            still_wanted = {row for part in gathered for row in part.waiting}
            pending = {row: held for row, held in pending.items() if row in still_wanted}
            for _, image in pending.values():
                image.release()
        for part in gathered:
            self._flush(part, pending, len(part.waiting), task["digest"])
            self._collect(part)
        if rows is None:
            rows = pa.Table.from_pylist(described, schema=ROWS_SCHEMA)
            write_table(self.store, task["rows"], rows)
        if rows.num_rows != index:
            raise RuntimeError(f"{shard.address} held {rows.num_rows} rows when first read and {index} now")
        for part in gathered:
            self._write(part, task)
        return rows

    def _from_columns(
        self,
        rows: pa.Table,
        jobs: list[StageJob],
        more: Mapping[str, Sequence[Any]],
        gates: list[str | None] | None,
        task: dict[str, Any],
    ) -> None:
        """Stages that look at columns alone: no bytes are read again."""
        if not jobs:
            return
        columns = {name: rows[name].to_pylist() for name in rows.column_names}
        pending = {
            index: (
                {name: values[index] for name, values in (*columns.items(), *more.items())},
                EncodedImage(None, columns["error"][index]),
            )
            for index in range(rows.num_rows)
        }
        for job in jobs:
            part = self._gather(job, task)
            self._take(part, pending, range(rows.num_rows), gates, task["digest"])
            self._flush(part, pending, len(part.waiting), task["digest"])
            self._collect(part)
            self._write(part, task)

    def _take(
        self,
        part: _Gathered,
        pending: Mapping[int, tuple[dict[str, Any], EncodedImage]],
        fresh: range,
        gates: list[str | None] | None,
        shard: str,
    ) -> None:
        """Queue fresh rows for a stage, and run it on as many full batches as are there."""
        for row in fresh:
            for values in part.values.values():
                values.append(None)
            gate = gates[row] if gates else None
            broken = pending[row][0]["error"] if not _stage_columns(part.job) else None
            part.errors.append(gate or broken)
            if gate is None and broken is None:
                if part.known and part.known["error"][row] is None:
                    for name, values in part.values.items():
                        values[row] = part.known[name][row]
                else:
                    part.waiting.append(row)
        size = part.job.stage.compute_batch or self.transport_batch
        while len(part.waiting) >= size:
            self._flush(part, pending, size, shard)
        if not part.job.stage.compute_batch:
            self._flush(part, pending, len(part.waiting), shard)

    def _flush(
        self, part: _Gathered, pending: Mapping[int, tuple[dict[str, Any], EncodedImage]], count: int, shard: str
    ) -> None:
        """Run the stage on its first `count` waiting rows."""
        if not count:
            return
        chosen, part.waiting = part.waiting[:count], part.waiting[count:]
        held = [pending[row] for row in chosen]
        names = held[0][0].keys()
        columns: dict[str, Sequence[Any]] = {name: [row[name] for row, _ in held] for name in names}
        columns["shard"] = [shard] * count
        images: list[LazyImage] = [image for _, image in held]
        measure, batch = self.measure_of(part.job), Batch(columns, images)
        if isinstance(measure, PreparedMeasure):
            ready = [self.preparing.submit(_prepare, measure, batch, row) for row in range(count)]
            part.under_way.append((chosen, self.computing.submit(_compute, measure, ready)))
            self._collect(part, BATCHES_AHEAD)
        else:
            _keep(part, chosen, self._measured(part.job, batch))

    def _collect(self, part: _Gathered, ahead: int = 0) -> None:
        """Wait for a stage's oldest batches until only `ahead` are under way."""
        while len(part.under_way) > ahead:
            chosen, answer = part.under_way.popleft()
            _keep(part, chosen, answer.result())

    def _measured(self, job: StageJob, batch: Batch) -> Columns:
        """The stage's answer; where a row breaks the stage itself, that row has an error and its neighbours do not."""
        measure = self.measure_of(job)
        if job.stage.compute_batch:
            return measure(batch)
        try:
            return measure(batch)
        except Exception as problem:
            if len(batch) == 1:
                reason = f"{job.name} breaks on it: {type(problem).__name__}"
                return Columns({column.name: [None] for column in job.columns}, [reason])
        rows = [
            self._measured(job, Batch({name: [values[row]] for name, values in batch.columns.items()}, [image]))
            for row, image in enumerate(batch.images)
        ]
        return Columns(
            {column.name: [answer.values[column.name][0] for answer in rows] for column in job.columns},
            [answer.errors[0] if answer.errors else None for answer in rows],
        )

    def _gather(self, job: StageJob, task: dict[str, Any]) -> _Gathered:
        """An empty answer; where failed rows are taken up again, with what an earlier unit knows of the others."""
        part = _Gathered(job, {column.name: [] for column in job.columns})
        if earlier := task.get("known", {}).get(job.name):
            table = pq.read_table(self.store.open(earlier))
            part.known = {name: table[name].to_pylist() for name in table.column_names}
        return part

    def _write(self, part: _Gathered, task: dict[str, Any]) -> None:
        arrays = {
            column.name: pa.array(_plain(part.values[column.name]), arrow_type(column.type))
            for column in part.job.columns
        }
        arrays["error"] = pa.array(part.errors, pa.string())
        write_table(self.store, task["units"][part.job.name], pa.table(arrays))


def _portions(samples: Iterable[Sample], most: int) -> Iterator[list[Sample]]:
    """Lists of consecutive samples: `most` of them, or fewer where TRANSPORT_BYTES are reached."""
    portion: list[Sample] = []
    held = 0
    for sample in samples:
        portion.append(sample)
        held += len(sample.data or b"")
        if len(portion) == most or held >= TRANSPORT_BYTES:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion


def _prepare(measure: PreparedMeasure, batch: Batch, row: int) -> Any:
    """One row made ready, and its pixels forgotten: whole batches of decoded pictures would fill the memory."""
    try:
        return measure.prepare(batch, row)
    finally:
        batch.images[row].release()


def _compute(measure: PreparedMeasure, ready: Sequence[Future[Any]]) -> Columns:
    return measure.compute([row.result() for row in ready])


def _keep(part: _Gathered, rows: Sequence[int], answer: Columns) -> None:
    """Put a batch's answer where its rows are. Raises RuntimeError where a stage has lost or invented values."""
    for name, values in part.values.items():
        given = answer.values[name]
        if len(given) != len(rows):
            raise RuntimeError(f"stage {part.job.name} gave {len(given)} values of {name} for {len(rows)} rows")
        for row, value in zip(rows, given, strict=True):
            values[row] = value
    for row, error in zip(rows, answer.errors or [None] * len(rows), strict=True):
        part.errors[row] = error


def _plain(values: list[Any]) -> list[Any]:
    """numpy scalars and vectors as Arrow takes them."""
    return [value.item() if getattr(value, "shape", None) == () else value for value in values]


def _stage_columns(job: StageJob) -> tuple[str, ...]:
    """The columns of other stages that a stage needs."""
    return tuple(name for name in job.stage.needs if "." in name)


def _describe(sample: Sample, index: int) -> dict[str, Any]:
    uid, image_id, sha256 = identify(sample)
    data = sample.data
    return {
        "uid": uid,
        "image_id": image_id,
        "index": index,
        "key": sample.key,
        "member": sample.member,
        "source_uid": sample.source_uid,
        "url": sample.url,
        "caption": sample.caption,
        "alternatives": sample.alternatives,
        "sha256": sha256,
        "size_bytes": len(data) if data is not None else 0,
        "ext": sniff(data) if data else None,
        "metadata": json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False) if sample.metadata else None,
        # A sample without a picture is no failure as long as no stage asks for one: captions can be judged alone.
        "error": sample.error,
    }


def write_table(store: Folder, path: str, table: pa.Table) -> None:
    """Commit one Parquet file. The same rows give the same bytes."""
    store.write_with(path, lambda stream: pq.write_table(table, stream, compression="zstd"))


def read_columns(store: Folder, path: str, columns: Sequence[str]) -> pa.Table:
    return pq.read_table(store.open(path), columns=list(columns))


def iter_tables(store: Folder, paths: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    for path in paths:
        yield read_columns(store, path, columns)
