"""The plan: a recipe resolved against its input and its store before anything runs.

Column flow is checked (a missing column names the stage that would have to come earlier), weights are located and
digested, shards are fingerprinted, finished units are found by content address. `sluice curate --dry-run` prints it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.storage import Folder
from pipelines.against import Held
from pipelines.measure import READER_COLUMNS, StageJob
from pipelines.readers import READER_VERSION, InputShard
from pipelines.recipe import Recipe, RecipeError, _nearest
from stages.contract import Context, Stage, digest_of, file_digest, weights_digest


@dataclass(frozen=True)
class Pass:
    """Stages that run together: after the same rules, on the same kind of worker."""

    rules_before: int
    is_model: bool
    jobs: tuple[StageJob, ...]


@dataclass
class Plan:
    """What a run will do. Keys of gated units are made by the runner, once their gate has been judged.

    retried: of units whose failed rows were taken up again, where the newer one lies.
    """

    recipe: Recipe
    context: Context
    shards: list[InputShard]
    digests: list[str]
    passes: list[Pass]
    rules_before: dict[str, int]
    models: dict[str, dict[str, Any]]
    numerics: dict[str, Any]
    stage_keys: dict[str, str] = field(default_factory=dict)
    held: Held = field(default_factory=Held)
    retried: dict[str, str] = field(default_factory=dict)

    def rows_path(self, digest: str) -> str:
        return f"units/read-v{READER_VERSION}/{digest[:32]}.parquet"

    def unit_path(self, stage: str, digest: str, gate_digest: str = "") -> str:
        """Where a stage's unit for one shard lies; a gated unit's name also says which rows it was allowed to see."""
        kind = self.recipe.stages[stage].type
        suffix = f"-{gate_digest[:16]}" if gate_digest else ""
        path = f"units/{kind}-{self.stage_keys[stage][:16]}/{digest[:32]}{suffix}.parquet"
        return self.retried.get(path, path)


def make_plan(
    recipe: Recipe,
    shards: list[InputShard],
    digests: list[str],
    context: Context,
    known: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> Plan:
    """Check column flow, locate weights and order the passes. Raises RecipeError, FileNotFoundError.

    known: (models, numerics) of a snapshot that was measured before, so that its weights need not be here any more.
    """
    rules_before = check_flow(recipe)
    if known:
        models, numerics = known
    else:
        models = {name: _model(stage, context) for name, stage in recipe.stages.items()}
        models = {name: model for name, model in models.items() if model["files"]}
        numerics = _numerics(recipe, context)
    plan = Plan(recipe, context, shards, digests, _passes(recipe, rules_before), rules_before, models, numerics)
    for name, stage in recipe.stages.items():
        upstream = [plan.stage_keys[need.partition(".")[0]] for need in stage.needs if "." in need]
        numbers = numerics if stage.compute_batch else None
        model = models.get(name, {}).get("digest")
        # Reading decides which row is which, so its version belongs to every unit.
        plan.stage_keys[name] = digest_of(
            "stage", READER_VERSION, stage.type, stage.version, stage.identity(), model, upstream, numbers
        )
    return plan


def check_flow(recipe: Recipe) -> dict[str, int]:
    """How many rules come before each stage; every column must be measured before it is needed. Raises RecipeError."""
    if not recipe.stages:
        raise RecipeError("the recipe has no stages; write stages: {decode: {}} at least")
    rule_names = list(recipe.rules)
    added: dict[str, str] = {}
    rules_before: dict[str, int] = {}
    guarded = _guarded(recipe)
    for name, stage in recipe.stages.items():
        for rule in stage.after:
            if rule not in recipe.rules:
                raise RecipeError(f"stages.{name}.after names the rule {rule!r}{_nearest(rule, rule_names)}")
        rules_before[name] = max((rule_names.index(rule) + 1 for rule in stage.after), default=0)
        if name in guarded:
            rules_before[name] = max(rules_before[name], guarded[name])
        for need in stage.needs:
            if need not in READER_COLUMNS and need not in added:
                raise RecipeError(f"stages.{name} needs the column {need!r}, {_who_adds(need, recipe, added)}")
            upstream = need.partition(".")[0]
            if "." in need and rules_before[upstream] > rules_before[name]:
                raise RecipeError(
                    f"stages.{name} needs {need!r}, measured only after {recipe.stages[upstream].after[-1]!r}; "
                    f"write after: {list(recipe.stages[upstream].after)} under stages.{name} too"
                )
        added.update({f"{name}.{column.name}": name for column in stage.adds})
    for position, (name, rule_) in enumerate(recipe.rules.items()):
        for need in rule_.needs:
            if need not in (*READER_COLUMNS, "dataset") and need not in added:
                raise RecipeError(f"rules.{name} needs the column {need!r}, {_who_adds(need, recipe, added)}")
            stage_name = need.partition(".")[0]
            if "." in need and rules_before[stage_name] > position:
                gate = rule_names[rules_before[stage_name] - 1]
                raise RecipeError(
                    f"rules.{name} needs {need!r}, but stages.{stage_name} runs only after rule {gate!r}; "
                    f"move rules.{name} below it"
                )
    return rules_before


def _guarded(recipe: Recipe) -> dict[str, int]:
    """How many rules come before each costly stage for the sake of rules that guard, whether it names them or not.

    Costly are models and what needs a column of theirs. A stage that a guard itself needs is not held back by it.
    """
    guards = [place for place, rule in enumerate(recipe.rules.values()) if rule.guards]
    if not guards:
        return {}
    rules = list(recipe.rules.values())
    needed = {need.partition(".")[0] for place in guards for need in rules[place].needs}
    held: dict[str, int] = {}
    for name, stage in recipe.stages.items():
        upstream = {need.partition(".")[0] for need in stage.needs if "." in need}
        if (stage.compute_batch or upstream & held.keys()) and name not in needed:
            held[name] = guards[-1] + 1
    return held


def _who_adds(need: str, recipe: Recipe, added: Mapping[str, str]) -> str:
    """The end of a sentence about a missing column: which stage adds it and where it would have to stand."""
    for name, stage in recipe.stages.items():
        if any(f"{name}.{column.name}" == need for column in stage.adds):
            return f"which stages.{name} adds: move stages.{name} before it"
    if "." not in need:
        return f"which no reader gives{_nearest(need, list(READER_COLUMNS))}"
    stage_name, _, _column = need.partition(".")
    if stage_name in recipe.stages:
        return f"but stages.{stage_name} adds only {', '.join(item.name for item in recipe.stages[stage_name].adds)}"
    return f"which no stage adds{_nearest(need, list(added))}; add a stage called {stage_name!r}"


def _passes(recipe: Recipe, rules_before: Mapping[str, int]) -> list[Pass]:
    """Stages grouped by (rules before, CPU measure or model), in order; a group needs only earlier groups."""
    groups: dict[tuple[int, bool], list[StageJob]] = {}
    for name, stage in recipe.stages.items():
        is_model = bool(stage.compute_batch)
        # A cheap stage that needs a model's column has to wait for the model's pass.
        is_model |= any(recipe.stages[need.partition(".")[0]].compute_batch for need in stage.needs if "." in need)
        groups.setdefault((rules_before[name], is_model), []).append(StageJob(name, stage))
    return [Pass(before, is_model, tuple(groups[before, is_model])) for before, is_model in sorted(groups)]


def _model(stage: Stage, context: Context) -> dict[str, Any]:
    """Name -> sha256 of each file whose content decides a stage's numbers, and one digest over them."""
    files = {name: file_digest(path) for name, path in stage.weights(context).items()}
    return {"digest": weights_digest(files.items()), "files": files}


def _numerics(recipe: Recipe, context: Context) -> dict[str, Any]:
    """What last bits of float models depend on: device kind, dtype, versions. Empty without a model stage."""
    models = [stage for stage in recipe.stages.values() if stage.compute_batch]
    if not models:
        return {}
    from importlib.metadata import version

    return {
        "device": context.device.partition(":")[0],
        "machine": platform.machine(),
        "dtype": sorted({str(getattr(stage, "precision", "fp32")) for stage in models}),
        "versions": {package: version(package) for package in ("torch", "open-clip-torch", "pillow")},
    }


def count_missing(store: Folder, paths: Sequence[str]) -> int:
    """How many of `paths` are not there yet, asking the filesystem once for all of them."""
    infos = store.filesystem.get_file_info([store.at(path) for path in paths]) if paths else []
    return sum(not info.is_file for info in infos)
