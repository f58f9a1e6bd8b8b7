"""What a training run's page says, read from the files in its folder.

    run.json                    what it was: kind, recipe, snapshot, teacher
    metrics.jsonl               {"step", "loss", "split": "train" or "held_out", "seconds", ...}, one a line
    samples/WHO/samples.json    [{"prompt", "file", "steps", "seconds"}, ...], files beside it; WHO: teacher, student.
                                Or {"steps", "seconds_per_image", "samples": [{"prompt", "file"}, ...]}
    evaluation.json             {"teacher": {"colour_rate": 0.97, ...}, "student": {...}}, or {"metric": value, ...}

`seconds` of a sample is the wall time of that one picture (a batch's time divided by its pictures). Every file but
run.json may be missing, and a last line that a killed run left half written is passed over.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

from cluster.storage import Folder
from pipelines.report.pictures import Thumbnail, thumbnail
from pipelines.report.plots import Line

POINTS = 400
SAMPLE_SIDE = 256
SPLIT_NAMES = {"train": "train", "held_out": "held out"}


@dataclass
class Losses:
    """Loss by split, in step order; a step that was logged twice (a resumed run) counts with its last value."""

    steps: dict[str, array[float]] = field(default_factory=dict)
    values: dict[str, array[float]] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    not_finite: int = 0

    def final(self, split: str) -> float | None:
        """The last finite loss of a held-out split; for train, the mean of the last twentieth."""
        values = [value for value in self.values.get(split, ()) if math.isfinite(value)]
        if not values:
            return None
        tail = values[-max(len(values) // 20, 1) :] if split == "train" else values[-1:]
        return sum(tail) / len(tail)


def read_losses(folder: Folder) -> Losses:
    found = Losses()
    if not folder.is_file("metrics.jsonl"):
        return found
    by_split: dict[str, dict[float, float]] = {}
    for line in _lines(folder, "metrics.jsonl"):
        try:
            said = json.loads(line)
            step, loss = float(said["step"]), float(said["loss"])
        except (ValueError, KeyError, TypeError):
            continue
        split = str(said.get("split") or "train")
        losses = by_split.setdefault(split, {})
        losses[step] = loss
        if split == "train":
            found.last = said
    for split, losses in by_split.items():
        steps = sorted(losses)
        found.steps[split] = array("d", steps)
        found.values[split] = array("d", (losses[step] for step in steps))
        found.not_finite += sum(not math.isfinite(value) for value in found.values[split])
    return found


def _lines(folder: Folder, path: str) -> Iterator[bytes]:
    rest = b""
    with folder.open(path) as stream:
        while block := stream.read(1 << 20):
            *whole, rest = (rest + block).split(b"\n")
            yield from whole
    yield rest


def loss_lines(losses: Losses) -> list[Line]:
    """Lines to draw: raw training losses faint, their running mean strong, held-out ones as they are."""
    drawn = []
    for split in sorted(losses.steps, key=lambda split: split != "train"):
        steps, values = _thin(losses.steps[split], losses.values[split])
        name = SPLIT_NAMES.get(split, split)
        if split == "held_out" or len(values) < 12:
            drawn.append(Line(name, steps, values, "held_out" if split != "train" else "train"))
        else:
            drawn.append(Line(name, steps, values, "faint"))
            drawn.append(Line(f"{name}, smoothed", steps, _smooth(values), "train"))
    return drawn


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: means over equal runs of logged steps."""
    size = math.ceil(len(steps) / POINTS) or 1
    thin_steps, thin_values = [], []
    for first in range(0, len(steps), size):
        part = [value for value in values[first : first + size] if math.isfinite(value)]
        if part:
            thin_steps.append(steps[min(first + size, len(steps)) - 1])
            thin_values.append(sum(part) / len(part))
    return thin_steps, thin_values


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of about a thirtieth of the curve around each point: it lags behind neither way."""
    reach = max(len(values) // 60, 1)
    sums = [0.0, *accumulate(values)]
    ends = [(max(place - reach, 0), min(place + reach + 1, len(values))) for place in range(len(values))]
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]


@dataclass(frozen=True)
class Drawn:
    """One picture that a model drew."""

    picture: Thumbnail
    steps: int | None
    seconds: float | None


@dataclass(frozen=True)
class Painter:
    """Who drew: a model by its role, with its steps and median seconds a picture."""

    name: str
    steps: int | None
    seconds: float | None


@dataclass(frozen=True)
class Grid:
    """The same prompts drawn by each painter: rows of (prompt, one Drawn or None a painter)."""

    painters: Sequence[Painter]
    rows: Sequence[tuple[str, Sequence[Drawn | None]]]
    prompts: int

    @property
    def comparison(self) -> str:
        """One sentence on steps and seconds of the first painter (the teacher) against the last (the student)."""
        if len(self.painters) < 2:
            return ""
        first, last = self.painters[0], self.painters[-1]
        parts = []
        if first.steps and last.steps:
            parts.append(f"the {last.name} takes {last.steps} steps where the {first.name} takes {first.steps}")
        if first.seconds and last.seconds:
            times = first.seconds / last.seconds
            word = f"{times:.1f} times less" if times >= 1 else f"{1 / times:.1f} times more"
            parts.append(f"{last.seconds:.3g} s a picture instead of {first.seconds:.3g} s, {word}")
        sentence = "; ".join(parts)
        return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


def read_grid(folder: Folder, most: int = 24) -> Grid | None:
    """Sampled pictures side by side by prompt; the n-th drawing of a prompt stands beside the n-th of the other."""
    found: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for who in ("teacher", "student"):
        path = f"samples/{who}/samples.json"
        if folder.is_file(path):
            counts: dict[str, int] = {}
            for one in _samples(folder.read_json(path)):
                prompt = str(one["prompt"])
                counts[prompt] = counts.get(prompt, 0) + 1
                found.setdefault(who, {})[prompt, counts[prompt]] = one
    if not found:
        return None
    painters = []
    for who, mine in found.items():
        steps = [one["steps"] for one in mine.values() if one.get("steps") is not None]
        seconds = [float(one["seconds"]) for one in mine.values() if one.get("seconds") is not None]
        painters.append(Painter(who, int(median(steps)) if steps else None, median(seconds) if seconds else None))
    keys = list(dict.fromkeys(key for mine in found.values() for key in mine))
    # Prompts that all have drawn come first: a comparison needs both sides.
    keys.sort(key=lambda key: -sum(key in mine for mine in found.values()))
    rows = [
        (key[0], [_drawn(folder, who, mine[key]) if key in mine else None for who, mine in found.items()])
        for key in keys[:most]
    ]
    return Grid(painters, rows, len(keys))


def _samples(said: Any) -> list[dict[str, Any]]:
    """Samples with their own steps and seconds; where they were timed together, each gets what all share."""
    if isinstance(said, list):
        return said
    shared = {"steps": said.get("steps"), "seconds": said.get("seconds_per_image")}
    return [{**shared, **one} for one in said.get("samples", ())]


def _drawn(folder: Folder, who: str, one: Mapping[str, Any]) -> Drawn:
    # A name from a JSON file must not lead out of its folder.
    name = PurePosixPath(str(one.get("file") or "")).name
    path = f"samples/{who}/{name}"
    picture = thumbnail(folder.read(path) if name and folder.is_file(path) else None, SAMPLE_SIDE)
    return Drawn(picture, one.get("steps"), one.get("seconds"))


@dataclass(frozen=True)
class Table:
    """A plain table for a page: cells are texts or numbers; note: a sentence under the title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


def evaluation_table(said: Any, title: str = "Evaluation") -> Table | None:
    """A table from evaluation.json: a mapping of models to metrics, one flat mapping, or a list of mappings."""
    if isinstance(said, list) and said and all(isinstance(one, Mapping) for one in said):
        columns = list(dict.fromkeys(str(name) for one in said for name in one))
        return Table(title, columns, [[one.get(name) for name in columns] for one in said])
    if not isinstance(said, Mapping) or not said:
        return None
    models = {str(name): value for name, value in said.items() if isinstance(value, Mapping)}
    flat = {str(name): value for name, value in said.items() if not isinstance(value, Mapping | list)}
    if models:
        flattened = {name: dict(_flatten(value)) for name, value in models.items()}
        metrics = list(dict.fromkeys(metric for value in flattened.values() for metric in value))
        rows = [
            [_words(metric), *(_share(metric, flattened[name].get(metric)) for name in flattened)] for metric in metrics
        ]
        note = "; ".join(f"{_words(name)}: {value}" for name, value in flat.items())
        return Table(title, ["", *map(_words, flattened)], rows, note)
    return Table(title, ["", "value"], [[_words(name), _share(name, value)] for name, value in flat.items()])


def _share(name: str, value: Any) -> Any:
    """Rates and accuracies between 0 and 1 as percentages."""
    if (
        isinstance(value, float)
        and 0 <= value <= 1
        and name.endswith(("rate", "accuracy", "recall", "precision", "share"))
    ):
        return f"{100 * value:.1f} %"
    return value


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield from _flatten(one, f"{prefix}{name} ")
        elif not isinstance(one, list):
            yield f"{prefix}{name}", one


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def read_run(address: str | Path) -> tuple[Folder, dict[str, Any], dict[str, Any]]:
    """(folder, run.json, model.json or {}) of a run. Raises ValueError, one sentence, where there is no run."""
    folder = Folder(address)
    if not folder.is_file("run.json"):
        raise ValueError(
            f"no training run at {folder.url}: run.json is not there; give the folder that `sluice train` or `sluice "
            "distill` wrote to"
        )
    model = folder.read_json("model/model.json") if folder.is_file("model/model.json") else {}
    return folder, folder.read_json("run.json"), model
