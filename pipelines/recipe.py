"""Recipes: what a user asks of a curation run, read from YAML and checked to the last key.

    input: {url: "data/{00000..00003}.tar"}
    stages:                                   # measure; the name is the instance, `type` defaults to it
      decode: {}
      hash: {type: perceptual_hash}
    rules:                                    # judge, in this order; each sees only rows still alive
      short_side: {column: decode.short_side, at_least: 64}
      exact: {type: exact_duplicates}
      near: {type: near_duplicates, radius: 8}

Order is meaning. Unknown keys are refused with the nearest known one. `resolved()` is the recipe with every default
written out and without paths or resources: what a snapshot's identity is made of.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from stages.contract import Stage
from stages.rules import Rule

# Where each type lives; modules are imported when a recipe names them.
STAGE_TYPES = {
    "decode": "stages.decode:Decode",
    "text_quality": "stages.text_quality:TextQuality",
    "language": "stages.language:Language",
    "perceptual_hash": "stages.hashing:PerceptualHash",
    "fast_hash": "stages.hashing:FastHash",
    "clip_score": "stages.clip_score:ClipScore",
    "caption_scores": "stages.caption_scores:CaptionScores",
    "caption_probe": "stages.caption_scores:CaptionProbe",
    "vqa": "stages.vqa:Vqa",
    "aesthetic": "stages.aesthetic:Aesthetic",
    "safety": "stages.safety:Safety",
    "nudenet": "stages.safety:NudeNet",
    "watermark": "stages.watermark:Watermark",
    "entropy": "stages.entropy:Entropy",
    "text_coverage": "stages.text_coverage:TextCoverage",
    "latents": "stages.latents:Latents",
    "text_embeddings": "stages.text_embeddings:TextEmbeddings",
    "recaption": "stages.recaption:Recaption",
    "synthetic_score": "stages.synthetic_score:SyntheticScore",
}
RULE_TYPES = {
    "threshold": "stages.rules:Threshold",
    "top_fraction": "stages.rules:TopFraction",
    "quantile": "stages.rules:Quantile",
    "known_bad": "stages.lists:KnownBad",
    "opt_out": "stages.lists:OptOut",
    "balance": "stages.balance:Balance",
    "exact_duplicates": "stages.dedupe:ExactDuplicates",
    "near_duplicates": "stages.dedupe:NearDuplicates",
    "contamination": "stages.contamination:Contamination",
    "semantic_duplicates": "stages.semantic:SemanticDuplicates",
}
FORMATS = ("auto", "webdataset", "parquet", "csv", "tsv", "folder")
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says where and what to write instead."""


@dataclass(frozen=True)
class Input:
    """Where raw data lies: a file, a folder, or a pattern with * and {a..b}; on any filesystem pyarrow can open.

    name: what its rows carry as `dataset`. images: folders in which a table may name images; its own by default.
    subset: DataComp's .npy of uids; only these are read, each as often as it stands there.
    """

    url: str = ""
    format: str = "auto"
    name: str = ""
    images: tuple[str, ...] = ()
    subset: str = ""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RecipeError(f"input.format {self.format!r} is none of {', '.join(FORMATS)}")
        if self.name and not _NAME.match(self.name):
            raise RecipeError(f"input.name {self.name!r}: a name is lower-case letters, digits and _")


@dataclass(frozen=True)
class HeldOut:
    """The share of duplicate groups that training never sees, chosen by hash of the group's image and `seed`."""

    fraction: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise RecipeError(f"held_out.fraction {self.fraction} is not in [0, 1)")


@dataclass(frozen=True)
class Pack:
    """input_shards: how many input shards, in order, one run of output covers. shard_samples, shard_bytes: most samples
    and image bytes of one tar of a run, 0 for no bound; a single larger image still gets a tar of its own."""

    input_shards: int = 1
    shard_samples: int = 0
    shard_bytes: int = 0

    def __post_init__(self) -> None:
        if self.input_shards < 1:
            raise RecipeError(f"pack.input_shards {self.input_shards} is not at least 1")
        for name in ("shard_samples", "shard_bytes"):
            if getattr(self, name) < 0:
                raise RecipeError(f"pack.{name} {getattr(self, name)} is not 0 (no bound) or more")


@dataclass(frozen=True)
class EngineOptions:
    """How a run is carried out; never part of what comes out. workers 0: one for each core."""

    workers: int = 0
    transport_batch: int = 8


@dataclass(frozen=True)
class Recipe:
    """A curation recipe. `stages` and `rules` keep the order they were written in.

    cache: folder on a disk that every worker reaches, where captioners record what they were answered; it may serve
    many recipes. Without it, a local output keeps its own.
    """

    input: tuple[Input, ...] = (Input(),)
    output: str = ""
    cache: str = ""
    models: tuple[str, ...] = ()
    stages: Mapping[str, Stage] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    held_out: HeldOut = HeldOut()
    pack: Pack = Pack()
    engine: EngineOptions = EngineOptions()

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the outcome, with defaults written out; no paths, no resources."""
        return {
            "stages": {name: {"type": stage.type, **stage.options()} for name, stage in self.stages.items()},
            "rules": {name: {"type": rule.type, **rule.options()} for name, rule in self.rules.items()},
            "held_out": _plain(self.held_out),
            "pack": _plain(self.pack),
        }


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), inputs: Sequence[str] = ()
) -> Recipe:
    """Read a recipe from a YAML file or a mapping, with `rules.clip.at_least=0.3` overrides laid over it.

    inputs: addresses that stand in for the recipe's own; options of a single input hold for each of them.

    Raises RecipeError for unknown keys, wrong types and names that are not there; FileNotFoundError for a missing file.
    """
    raw = _read_yaml(source) if isinstance(source, str | Path) else dict(source)
    for override in overrides:
        raw = override_at(raw, override)
    refuse_unknown(raw, [item.name for item in fields(Recipe)], "the recipe")
    sections: dict[str, Any] = {"input": _build_inputs(raw.get("input"), inputs)}
    for name, kind in (("held_out", HeldOut), ("pack", Pack), ("engine", EngineOptions)):
        if name in raw:
            sections[name] = _build(kind, raw[name] or {}, name)
    if "models" in raw:
        models = raw["models"] or ()
        sections["models"] = (models,) if isinstance(models, str) else tuple(map(str, models))
    for name in ("output", "cache"):
        if name in raw:
            sections[name] = str(raw[name] or "")
    stages = _build_named(raw.get("stages"), "stages", STAGE_TYPES, "sluice.stages", default_type=None)
    rules = _build_named(raw.get("rules"), "rules", RULE_TYPES, "sluice.rules", default_type="threshold")
    return Recipe(**sections, stages=stages, rules=rules)


def _build_inputs(raw: Any, urls: Sequence[str]) -> tuple[Input, ...]:
    """The datasets of a recipe: one mapping or a list of them, or `urls` in their place."""
    common = raw if isinstance(raw, Mapping) else {}
    given = [{**common, "url": url} for url in urls] if urls else raw if isinstance(raw, list) else [raw or {}]
    where = ["input"] if len(given) == 1 else [f"input.{place}" for place in range(len(given))]
    return tuple(_build(Input, item, place) for item, place in zip(given, where, strict=True))


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path} is not YAML: {problem}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds {type(raw).__name__}, not the keys of a recipe (input, stages, rules, ...)")
    return raw


def override_at(raw: Mapping[str, Any], override: str) -> dict[str, Any]:
    """A copy of `raw` with one `dotted.path=value` set; the value is read as YAML. Raises RecipeError."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set {override!r} is not of the form rules.name.option=value")
    parts = path.strip().split(".")
    result = dict(raw)
    here = result
    for depth, part in enumerate(parts[:-1]):
        inner = here.get(part)
        if inner is None and part in here:
            inner = {}
        if not isinstance(inner, Mapping):
            if depth == 0 and part in {item.name for item in fields(Recipe)}:
                inner = {}
            else:
                where = ".".join(parts[:depth]) or "the recipe"
                raise RecipeError(f"--set {path}: {where} has no {part!r}{_nearest(part, list(here))}")
        here[part] = dict(inner)
        here = here[part]
    here[parts[-1]] = yaml.safe_load(text)
    return result


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise RecipeError for the first key of `given` that is not `known`, naming the nearest known one."""
    known = list(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"{where} has no option {key!r}{_nearest(str(key), known)}")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    listed = ", ".join(map(str, known)) or "nothing"
    return f"; did you mean {close[0]!r}?" if close else f"; it has {listed}"


def _build_named(
    raw: Any, section: str, types: Mapping[str, str], group: str, default_type: str | None
) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{section} is a {type(raw).__name__}; write `name: {{option: value}}` under it, one a line")
    built = {}
    for name, options in raw.items():
        where = f"{section}.{name}"
        if not isinstance(name, str) or not _NAME.match(name):
            raise RecipeError(f"{where}: a name is lower-case letters, digits and _, and begins with a letter")
        options = dict(options or {}) if isinstance(options, Mapping | type(None)) else None
        if options is None:
            raise RecipeError(f"{where} is not a set of options; write {name}: {{}} for the defaults")
        kind = options.pop("type", default_type or name)
        built[name] = _build(find_type(str(kind), types, group, where), options, where)
    return built


def find_type(kind: str, types: Mapping[str, str], group: str, where: str) -> type:
    """The class of a stage or rule type, from this project or another package's entry points."""
    if kind in types:
        module, _, name = types[kind].partition(":")
        return getattr(importlib.import_module(module), name)
    found = {point.name: point for point in entry_points(group=group)}
    if kind in found:
        return found[kind].load()
    raise RecipeError(f"{where}: there is no type {kind!r}{_nearest(kind, [*types, *found])}")


def _build(kind: type, options: Any, where: str) -> Any:
    """An instance of dataclass `kind` from plain options, types coerced by field (YAML reads 3e-4 as a string)."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(options, Mapping):
        raise RecipeError(f"{where} is a {type(options).__name__}, not a set of options")
    refuse_unknown(options, [item.name for item in fields(kind) if item.init], where)
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as problem:
        first = problem.errors()[0]
        option = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f" (it is {first['input']!r})"
        raise RecipeError(f"{where}{'.' + option if option else ''}: {what[0].lower() + what[1:]}{given}") from None


def _plain(value: Any) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in fields(value)}
