"""Units of work of an evaluation: pictures drawn once, looked at once, committed one unit at a time.

    OUT/drawings/<unit>.parquet      16 prompts drawn by one model: prompt, seed, PNG bytes, seconds
    OUT/measures/<measure>.parquet   what one stage said of one unit's pictures

A drawing unit is named by model x sampling x prompts and seeds, a measure by its unit x stage x weights. A unit that
exists is complete and is never made again, whoever was killed when; only units in flight, one a worker, are. All
stages see one decode. Snapshot pictures are units too, without drawings: their bytes lie in the snapshot's shards.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.storage import Folder
from stages.aesthetic import Aesthetic
from stages.clip_score import ClipScore
from stages.contract import Batch, Context, Stage, digest_of, file_digest, weights_digest
from stages.decode import EncodedImage
from stages.hashing import PerceptualHash
from stages.safety import Safety
from stages.vqa import Vqa
from training.evaluation.composition import Composition
from training.evaluation.faithfulness import Faithfulness
from training.evaluation.features import Inception
from training.evaluation.preference import Preference
from training.evaluation.suites import Prompt

UNIT = 16  # drawings a unit: what a kill can cost, a worker
PICTURES_UNIT = 64  # snapshot pictures a unit
VERSION = 1  # of how pictures are drawn here; raised when they would come out otherwise

STAGES: dict[str, type[Stage]] = {
    kind.type: kind
    for kind in (PerceptualHash, ClipScore, Aesthetic, Inception, Preference, Composition, Faithfulness, Safety, Vqa)
}


@dataclass(frozen=True)
class Drawing:
    """One picture to draw: the prompt and the seed. purpose: suite, distances, memorisation or another word."""

    prompt: Prompt
    seed: int
    purpose: str


@dataclass(frozen=True)
class Look:
    """One stage to look at pictures with, by the name of its columns. digest: of its weights; files: of each."""

    name: str
    type: str
    options: Mapping[str, Any]
    digest: str
    files: Mapping[str, str]

    def stage(self) -> Stage:
        return STAGES[self.type](**self.options)

    def measure(self, unit: str) -> str:
        """The name of what this stage says of a unit. Options leave paths out; the weights' digest stands for them."""
        stage = self.stage()
        return digest_of("measure", unit, self.name, self.type, stage.version, stage.identity(), self.digest)


def look(name: str, kind: str, options: Mapping[str, Any], context: Context, behind: str = "") -> Look:
    """A Look with the digests of its weights. behind: digest of the stage whose columns it reads.

    Raises FileNotFoundError or ValueError where weights are missing.
    """
    files = {short: file_digest(path) for short, path in STAGES[kind](**options).weights(context).items()}
    return Look(name, kind, dict(options), digest_of(weights_digest(files.items()), behind), files)


def drawing_units(
    model: Mapping[str, Any], drawings: Sequence[Drawing], looks: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """The units in which `model` draws `drawings`, in order. Every purpose begins a unit of its own.

    looks: purpose -> the stages that look at its drawings.
    """
    units = []
    for purpose in dict.fromkeys(one.purpose for one in drawings):
        mine = [one for one in drawings if one.purpose == purpose]
        for start in range(0, len(mine), UNIT):
            part = mine[start : start + UNIT]
            asked = [[one.prompt.text, one.seed] for one in part]
            rows = [{"prompt": one.prompt.to_json(), "seed": one.seed} for one in part]
            unit = digest_of("drawings", VERSION, model["digest"], model["sampling"], asked)
            seen_by = list(looks[purpose])
            units.append({"unit": unit, "painter": model["name"], "purpose": purpose, "rows": rows, "looks": seen_by})
    return units


def snapshot_units(snapshot: Any, split: str, limit: int, looks: Sequence[str]) -> list[dict[str, Any]]:
    """The units that hold the first `limit` pictures of a split, in the order of shards."""
    from training.data import SnapshotSamples

    samples, units, taken = SnapshotSamples(snapshot), [], 0
    for shard in range(len(samples.shards)):
        rows = samples.rows(shard, split)[: limit - taken]
        taken += len(rows)
        for start in range(0, len(rows), PICTURES_UNIT):
            part = [[row.uid, row.image_id, row.shard, row.key] for row in rows[start : start + PICTURES_UNIT]]
            unit = digest_of("pictures", snapshot.id, split, part)
            place = {"snapshot": snapshot.folder.url, "split": split}
            units.append({"unit": unit, **place, "rows": part, "looks": list(looks)})
    return units


class Worker:
    """Draws and looks at units. Built once on a worker from {store, painters, models, device, looks, attempt}."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.store = Folder(config["store"])
        self.painters, self.attempt = config["painters"], config["attempt"]
        self.context = Context(models=tuple(config["models"]), device=config["device"])
        self.looks = [Look(**described) for described in config["looks"]]
        self._opened: dict[str, Any] = {}
        self._painter: tuple[str, Any] = ("", None)
        self._samples: tuple[str, Any] = ("", None)
        if config["device"] == "cpu":
            import torch

            # Last bits depend on how many threads share a sum: one, wherever this runs.
            torch.set_num_threads(1)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        images, columns, drawn = self._pictures(task)
        batch = Batch(columns, images)
        for one in (one for one in self.looks if one.name in task["looks"]):
            path = f"measures/{one.measure(task['unit'])}.parquet"
            if self.store.is_file(path):
                values, errors = read_measure(self.store, path)
            else:
                if one.name not in self._opened:
                    self._opened[one.name] = one.stage().open(self.context)
                found = self._opened[one.name](batch)
                values, errors = dict(found.values), list(found.errors or [None] * len(images))
                write_measure(self.store, path, values, errors)
            batch.columns |= {f"{one.name}.{column}": value for column, value in values.items()}
        return {"unit": task["unit"], "drawn": drawn, "rows": len(images)}

    def _pictures(self, task: dict[str, Any]) -> tuple[list[EncodedImage], dict[str, Any], int]:
        if "painter" in task:
            prompts = [row["prompt"] for row in task["rows"]]
            path, drawn = drawings_path(task["unit"]), 0
            if not self.store.is_file(path):
                self._draw(task, path)
                drawn = len(prompts)
            images = [EncodedImage(png) for png in read_drawings(self.store, path)]
            return images, {"caption": [prompt["text"] for prompt in prompts], "prompt": prompts}, drawn
        if self._samples[0] != task["snapshot"]:
            from pipelines.snapshot import open_snapshot
            from training.data import SnapshotSamples

            self._samples = task["snapshot"], SnapshotSamples(open_snapshot(task["snapshot"]))
        from training.data import Row

        samples = [self._samples[1].read(Row(*row), task["split"]) for row in task["rows"]]
        captions = [sample.caption for sample in samples]
        # A caption is no prompt that could be checked: it asks for nothing that is known.
        prompts = [Prompt(caption, "captions").to_json() for caption in captions]
        return [EncodedImage(sample.image) for sample in samples], {"caption": captions, "prompt": prompts}, 0

    def _draw(self, task: dict[str, Any], path: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from training.painters import open_painter

        name = task["painter"]
        if self._painter[0] != name:
            said = self.painters[name]
            opened = open_painter(
                said["folder"], device=self.context.device, models=self.context.models, sampling=said["sampling"]
            )
            self._painter = name, opened
        texts, seeds = [row["prompt"]["text"] for row in task["rows"]], [row["seed"] for row in task["rows"]]
        began = time.perf_counter()
        pictures = self._painter[1].draw(texts, seeds)
        seconds = time.perf_counter() - began
        table = pa.table({"prompt": texts, "seed": pa.array(seeds, pa.int64()), "png": [_png(one) for one in pictures]})
        facts = {"painter": name, "attempt": self.attempt, "seconds": seconds, "schema_version": "1.0"}
        table = table.replace_schema_metadata({"evaluation": json.dumps(facts)})
        self.store.write_with(path, lambda stream: pq.write_table(table, stream, compression="none"))


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


# --- files ------------------------------------------------------------------------------------------------------------


def drawings_path(unit: str) -> str:
    return f"drawings/{unit}.parquet"


def read_drawings(store: Folder, path: str) -> list[bytes]:
    """The PNG bytes of a unit's drawings, in order."""
    import pyarrow.parquet as pq

    return [bytes(png) for png in pq.read_table(store.open(path), columns=["png"])["png"].to_pylist()]


def write_measure(store: Folder, path: str, values: Mapping[str, Sequence[Any]], errors: Sequence[str | None]) -> None:
    """Commit a stage's columns; vectors as lists of float32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name, column in values.items():
        vectors = any(isinstance(value, np.ndarray) for value in column)
        plain = [np.asarray(value, np.float32).tolist() if isinstance(value, np.ndarray) else value for value in column]
        # Hashes fill all 64 bits.
        bits = any(isinstance(value, int) and value > 2**63 - 1 for value in column)
        kind = pa.list_(pa.float32()) if vectors else pa.uint64() if bits else None
        columns[name] = pa.array(plain, kind)
    table = pa.table({**columns, "error": pa.array(list(errors), pa.string())})
    store.write_with(path, lambda stream: pq.write_table(table, stream))


def read_measure(store: Folder, path: str) -> tuple[dict[str, list[Any]], list[str | None]]:
    """The columns of a measure, vectors as arrays, and each row's error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(store.open(path))
    values: dict[str, list[Any]] = {}
    for name in table.column_names:
        column = table[name].to_pylist()
        vectors = pa.types.is_list(table.schema.field(name).type)
        values[name] = [np.array(v, np.float32) if vectors and v is not None else v for v in column]
    return values, values.pop("error")


def gather(
    store: Folder, units: Sequence[Mapping[str, Any]], look: Look
) -> tuple[dict[str, list[Any]], list[str | None]]:
    """A stage's columns over all units, row by row in their order; None where it did not look."""
    names = [column.name for column in look.stage().adds]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    errors: list[str | None] = []
    for unit in units:
        if look.name in unit["looks"]:
            values, failed = read_measure(store, f"measures/{look.measure(unit['unit'])}.parquet")
        else:
            values, failed = {}, [None] * len(unit["rows"])
        errors += failed
        for name in names:
            columns[name] += values.get(name, [None] * len(failed))
    return columns, errors


def described(looks: Sequence[Look]) -> list[dict[str, Any]]:
    """Looks as JSON, for a worker's config."""
    return [{**asdict(one), "options": dict(one.options), "files": dict(one.files)} for one in looks]


def undone(store: Folder, units: Sequence[Mapping[str, Any]], looks: Sequence[Look]) -> Iterator[dict[str, Any]]:
    """The units that are not drawn yet or that some stage has not looked at."""
    drawn = {entry.path.rpartition("/")[2] for entry in store.files("drawings", "*.parquet")}
    measured = {entry.path.rpartition("/")[2] for entry in store.files("measures", "*.parquet")}
    for unit in units:
        complete = "painter" not in unit or f"{unit['unit']}.parquet" in drawn
        wanted = (one.measure(unit["unit"]) for one in looks if one.name in unit["looks"])
        if not (complete and all(f"{name}.parquet" in measured for name in wanted)):
            yield dict(unit)


# --- speed ------------------------------------------------------------------------------------------------------------


class SpeedWorker:
    """Times painters alone on a worker: seconds and memory of one picture by number of steps."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.painters, self.models, self.device = config["painters"], config["models"], config["device"]

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        from training.painters import open_painter

        said = self.painters[task["painter"]]
        painter = open_painter(said["folder"], device=self.device, models=self.models, sampling=said["sampling"])
        with _Memory(self.device) as memory:
            timed = [self._timed(painter, task["prompt"], steps, task["repeats"]) for steps in task["steps"]]
        return {
            "painter": task["painter"],
            "device": self.device,
            "weights_bytes": painter.weights_bytes,
            "peak_bytes": memory.peak,
            "peak_of": memory.of,
            "by_steps": timed,
        }

    def _timed(self, painter: Any, prompt: str, steps: int, repeats: int) -> dict[str, Any]:
        painter.draw([prompt], [0], steps=steps)  # the first pass allocates: not what a picture costs
        seconds = []
        for seed in range(repeats):
            began = time.perf_counter()
            painter.draw([prompt], [seed], steps=steps)
            seconds.append(time.perf_counter() - began)
        return {"steps": steps, "seconds": float(np.median(seconds)), "least": min(seconds), "most": max(seconds)}


class _Memory:
    """Peak memory over a block: the allocator's on a GPU; on a CPU the process's growth, which is rough."""

    def __init__(self, device: str) -> None:
        self.device, self.peak, self.of = device, 0, "process, resident"

    def __enter__(self) -> _Memory:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.of = "GPU, allocated"
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            import torch

            self.peak = int(torch.cuda.max_memory_allocated())
        else:
            import resource

            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
