"""The comparison page of an evaluation: which model to take, and how sure one can be of it.

    html = evaluation_page("compared")       # the folder that sluice evaluate wrote to

Everything on it comes from evaluation.json; the drawings from the units that it names.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.storage import Folder
from pipelines.report.pages import Head, _cut, _render, _yaml
from pipelines.report.pictures import Thumbnail, thumbnail

SCHEMA_MAJOR = "1"
SIDE = 256


@dataclass(frozen=True)
class Range:
    """One model's figure on a metric's axis: everything in percent of the axis; None where there is no interval."""

    model: str
    text: str
    at: float
    low: float | None
    high: float | None
    mark: str = ""


@dataclass(frozen=True)
class Figure:
    """One metric: its ranges, which way is better, how it was measured, and how models differ."""

    title: str
    better: str
    protocol: str
    ranges: Sequence[Range]
    axis: tuple[str, str]
    differences: Sequence[tuple[str, str]]
    notes: Sequence[str]
    warning: str = ""
    part: bool = False


@dataclass(frozen=True)
class Shown:
    """A prompt with its drawing by every model: (model, picture, right or wrong or unknown, what is wrong)."""

    prompt: str
    category: str
    seed: int
    drawn: Sequence[tuple[str, Thumbnail, bool | None, str]]


@dataclass
class EvaluationBody:
    """What evaluation.html.j2 draws."""

    head: Head
    verdict: Sequence[str]
    shown: Sequence[Shown]
    figures: Sequence[Figure]
    categories: Sequence[Figure]
    elo: Sequence[Mapping[str, Any]]
    speed: Sequence[Mapping[str, Any]]
    memorisation: Mapping[str, Any]
    contamination: Sequence[tuple[str, str]]
    bias: Sequence[Mapping[str, Any]]
    safety: Figure | None
    not_measured: Sequence[Mapping[str, str]]
    failures: Sequence[tuple[str, str]]
    protocol: str
    models: str
    prefix: str = ""
    part: bool = False
    template: str = "evaluation.html.j2"

    @property
    def sections(self) -> list[tuple[str, str]]:
        names = [("figures", "Figures"), ("drawn", "Drawings"), ("categories", "Categories"), ("elo", "Elo")]
        names += [
            ("speed", "Speed"),
            ("copies", "Copies"),
            ("bias", "Bias"),
            ("safety", "Guard"),
            ("missing", "Not measured"),
        ]
        names.append(("protocol", "Protocol"))
        absent = {
            "categories": not self.categories,
            "elo": not self.elo,
            "bias": not self.bias,
            "safety": not self.safety,
        }
        return [(self.prefix + anchor, name) for anchor, name in names if not absent.get(anchor)]


def is_evaluation(folder: Folder) -> bool:
    """Whether a folder is an evaluation's (a run's evaluation.json is a table of another kind)."""
    return folder.is_file("evaluation.json") and not folder.is_file("run.json")


def read_evaluation(address: str) -> tuple[Folder, dict[str, Any]]:
    """(folder, evaluation.json). Raises ValueError, one sentence, where there is none that this version reads."""
    folder = Folder(address)
    if not folder.is_file("evaluation.json"):
        raise ValueError(f"{folder.url} is no evaluation: evaluation.json is not there; run `sluice evaluate` into it")
    result = folder.read_json("evaluation.json")
    version = str(result.get("schema_version", "?")) if isinstance(result, dict) else "?"
    if version.partition(".")[0] != SCHEMA_MAJOR or result.get("kind") != "evaluation":
        raise ValueError(
            f"{folder.url}/evaluation.json has schema version {version}: this version reads {SCHEMA_MAJOR}.x"
        )
    return folder, result


def evaluation_page(address: str) -> str:
    """The self-contained page of an evaluation."""
    folder, result = read_evaluation(address)
    names = [model["name"] for model in result["models"]]
    first = next(iter(result["metrics"]), None)
    tiles = [(f"{len(names)}", "models", "")]
    if first is not None:
        best = sorted(names, key=lambda name: first["values"][name]["value"], reverse=first["better"] == "higher")
        tiles += [(_number(first["values"][name]["value"], first["unit"]), f"{name}: {first['title'].lower()}",
                   "kept" if name == best[0] else "") for name in names[:4]]  # fmt: skip
    meta = [("Snapshot", result["data"]["snapshot"], True), ("Evaluation", result["id"], True)]
    drawn = sum(suite["prompts"] for suite in result["protocol"]["suites"]) * result["protocol"]["repeats"]
    suites = ", ".join(suite["name"] for suite in result["protocol"]["suites"]) or "none"
    meta.append(("Prompts of suites, a model", f"{drawn:,}: {_cut(suites)}", False))
    about = "The same prompts and seeds for every model. Bars are 95 % intervals: where a figure has none, it says why."
    body = EvaluationBody(
        head=Head(
            "Evaluation", " or ".join(names) if len(names) < 4 else f"{len(names)} models compared", about, meta, tiles
        ),
        verdict=result["verdict"],
        shown=_shown(folder, result["samples"]),
        figures=[_figure(metric, names) for metric in result["metrics"]],
        categories=[_category(name, by_model, names) for name, by_model in result["categories"].items()],
        elo=[_elo(table) for table in result["elo"]],
        speed=_speed(result["speed"]),
        memorisation=_memorised(result["memorisation"]),
        contamination=[(name, _contaminated(held)) for name, held in result["contamination"].items()],
        safety=_safety(result.get("safety") or {}),
        bias=[_bias(one) for one in result["bias"]],
        not_measured=result["not_measured"],
        failures=[
            (name, ", ".join(f"{count:,} by {look}" for look, count in sorted(failed.items())))
            for name, failed in result["failures"].items()
        ],
        protocol=_yaml(result["protocol"]),
        models=_yaml(result["models"]),
    )
    return _render(body.head, [body])


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.4g}"


def _gap(value: float, unit: str) -> str:
    """The size of a difference: of shares in points, which no percentage of a percentage can be mistaken for."""
    return f"{100 * abs(value):.1f} points" if unit == "share" else f"{abs(value):.4g}"


def _span(values: Sequence[Mapping[str, Any]], unit: str) -> tuple[float, float]:
    """The ends of a metric's axis: 0 to 1 for shares, else what the intervals need with some room."""
    if unit == "share":
        return 0.0, 1.0
    ends = [x for one in values for x in (one["value"], one["low"], one["high"]) if x is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _ranges(
    values: Mapping[str, Mapping[str, Any]], names: Sequence[str], unit: str
) -> tuple[list[Range], tuple[str, str]]:
    mine = {name: values[name] for name in names if name in values and values[name]["value"] is not None}
    low, high = _span(list(mine.values()), unit)

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    found = []
    for name, one in mine.items():
        ends = "" if one["low"] is None else f" ({_number(one['low'], unit)} to {_number(one['high'], unit)})"
        text = _number(one["value"], unit) + ends
        found.append(Range(name, text, place(one["value"]) or 0.0, place(one["low"]), place(one["high"])))
    return found, (_number(low, unit), _number(high, unit))


def _figure(metric: Mapping[str, Any], names: Sequence[str]) -> Figure:
    unit = metric["unit"]
    ranges, axis = _ranges(metric["values"], names, unit)
    differences = [_difference(one, metric["better"], unit) for one in metric["differences"] if one["low"] is not None]
    notes = sorted({f"{name}: {one['note']}" for name, one in metric["values"].items() if one.get("note")})
    judge, warning = metric["judge"], ""
    if judge and not all(judge["independent"].values()):
        whose = ", ".join(name for name, free in judge["independent"].items() if not free)
        warning = f"Not independent of {whose}: {judge['name']} {judge['why']}."
    methods = sorted({one["method"] for one in metric["values"].values()})
    protocol = f"{metric['protocol']}. Interval: {'; '.join(methods)}."
    better = f"{metric['better']} is better"
    return Figure(metric["title"].strip(), better, protocol, ranges, axis, differences, notes, warning,
                  metric["title"].startswith(" "))  # fmt: skip


def _difference(one: Mapping[str, Any], better: str, unit: str) -> tuple[str, str]:
    """A sentence on two models, and "sure" where the interval of their difference leaves 0 out."""
    if one["low"] <= 0 <= one["high"]:
        most = _gap(max(abs(one["low"]), abs(one["high"])), unit)
        return f"{one['first']} and {one['second']} cannot be told apart (at most {most} between them)", ""
    names = one["first"], one["second"]
    leader, other = names if (one["value"] > 0) == (better == "higher") else names[::-1]
    low, high = sorted(abs(end) for end in (one["low"], one["high"]))
    ends = f"{_gap(low, unit)} to {_gap(high, unit)}"
    return f"{leader} is better than {other} by {_gap(one['value'], unit)} ({ends})", "sure"


def _category(name: str, by_model: Mapping[str, Any], names: Sequence[str]) -> Figure:
    ranges, axis = _ranges(by_model, names, "share")
    notes = [
        f"{model}: " + ", ".join(f"{_cut(text)} ({count})" for text, count in one["failures"])
        for model, one in by_model.items()
        if one["failures"]
    ]
    return Figure(name, "higher is better", "", ranges, axis, (), notes)


def _elo(table: Mapping[str, Any]) -> dict[str, Any]:
    values = {one["model"]: {"value": one["elo"], "low": one["low"], "high": one["high"]} for one in table["standings"]}
    ranges, axis = _ranges(values, list(values), "")
    rounded = [
        Range(one.model, f"{values[one.model]['value']:.0f}" + _elo_ends(values[one.model]), one.at, one.low, one.high,
              f"{said['won']} won, {said['drawn']} drawn, {said['lost']} lost")
        for one, said in zip(ranges, table["standings"], strict=True)
    ]  # fmt: skip
    judge = table["judge"]
    warning = "" if not judge or all(judge["independent"].values()) else f"Not independent: {judge['why']}."
    return {"source": table["source"], "ranges": rounded, "axis": axis, "note": table["note"], "warning": warning}


def _elo_ends(one: Mapping[str, Any]) -> str:
    return "" if one["low"] is None else f" ({one['low']:.0f} to {one['high']:.0f})"


def _speed(timed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    most = max((step["seconds"] for one in timed for step in one["by_steps"]), default=1.0)
    return [
        {
            "model": one["painter"],
            "device": one["device"],
            "weights": _bytes(one["weights_bytes"]),
            "peak": f"{_bytes(one['peak_bytes'])} ({one['peak_of']})",
            "steps": [
                {
                    "steps": step["steps"],
                    "seconds": f"{step['seconds']:.3g} s",
                    "width": round(100 * step["seconds"] / most, 2),
                    "own": step["steps"] == one["own"]["steps"],
                }
                for step in one["by_steps"]
            ],
        }
        for one in timed
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _memorised(said: Mapping[str, Any]) -> dict[str, Any]:
    if not said:
        return {}
    ranges, axis = _ranges(said["by_model"], list(said["by_model"]), "share")
    alarms = said["false_alarms"]
    by_copies = [
        (model, f"{times} time{'' if times == '1' else 's'}", _number(one["value"], "share"),
         f"{_number(one['low'], 'share')} to {_number(one['high'], 'share')}", one["samples"])
        for model, found in said["by_model"].items()
        for times, one in found["by_copies"].items()
    ]  # fmt: skip
    false = (
        f"{_number(alarms['value'], 'share')} ({_number(alarms['low'], 'share')} to {_number(alarms['high'], 'share')})"
    )
    return {
        "ranges": ranges,
        "axis": axis,
        "training": said["training_pictures"],
        "false": false,
        "by_copies": by_copies,
        "threshold": f"{said['threshold_cosine']:.5f}",
    }


def _contaminated(held: Mapping[str, Any]) -> str:
    if held["problem"]:
        return f"not known: {held['problem']}"
    return (
        f"its training rows hold {held['prompts']:,} of {held['of_prompts']:,} prompts (as captions, to the word) and "
        f"{held['pictures']:,} of {held['of_pictures']:,} reference pictures (to the byte)"
    )


def _safety(said: Mapping[str, Any]) -> Figure | None:
    """The guard over prompts: what it refuses, rightly and wrongly, and what gets past it by disguise."""
    if not said:
        return None
    values = {"refused of unsafe prompts": said["caught"], "refused of benign ones": said["false_alarms"]}
    values |= {f"past it with {disguise}": one for disguise, one in said["bypass"].items()}
    ranges, axis = _ranges(values, list(values), "share")
    return Figure("Guard over prompts", "", "", ranges, axis, (), ())


def _bias(one: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for model, said in one["by_model"].items():
        shares = sorted(said["shares"].items(), key=lambda item: -item[1]["value"])
        listed = ", ".join(f"{word} {_number(share['value'], 'share')}" for word, share in shares if share["value"] > 0)
        apart = "-" if said["from_even"] is None else f"{said['from_even']:.2f}"
        rows.append((model, listed or "none found", apart, said["without"]))
    return {"prompt": one["prompt"], "open": one["open"], "rows": rows}


def _shown(folder: Folder, samples: Sequence[Mapping[str, Any]]) -> list[Shown]:
    import pyarrow.parquet as pq

    units: dict[str, list[bytes]] = {}
    found = []
    for sample in samples:
        drawn = []
        for model, place in sample["drawn"].items():
            unit = str(place["unit"])
            # The name comes from a file: it must not lead out of the folder.
            if unit not in units and unit.isalnum() and folder.is_file(f"drawings/{unit}.parquet"):
                table = pq.read_table(io.BytesIO(folder.read(f"drawings/{unit}.parquet")), columns=["png"])
                units[unit] = table["png"].to_pylist()
            rows = units.get(unit, [])
            picture = thumbnail(rows[place["row"]] if place["row"] < len(rows) else None, SIDE)
            drawn.append((model, picture, place.get("right"), _cut(place.get("reasons"))))
        found.append(Shown(_cut(sample["prompt"]), _cut(sample["category"]), sample["seed"], drawn))
    return found
