"""What a run would do again, and why: the plan held against the newest snapshot of its output.

A unit of work is found by what went into it, so a run does again exactly what is not there. This module says the same
beforehand: which stage on which shards, and what is different from the run that left the newest snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage import Folder
from pipelines.plan import Plan
from pipelines.readers import READER_VERSION
from pipelines.snapshot import Snapshot, SnapshotError, open_snapshot


@dataclass(frozen=True)
class Change:
    """Something that is done again. what: "stage", "judge" or "pack". shards: digests of the shards it is done on; for
    a stage behind a gate those it may be done on, known once the rules before it are judged."""

    what: str
    name: str
    shards: tuple[str, ...]
    why: tuple[str, ...]
    after_gate: bool = False


def stage_facts(plan: Plan) -> dict[str, Any]:
    """What decides each stage's numbers, as it is kept beside a snapshot."""
    return {
        name: {
            "options": stage.identity(),
            "type": stage.type,
            "version": stage.version,
            "after": list(stage.after),
            "model": plan.models.get(name, {}).get("digest"),
            "numerics": plan.numerics if stage.compute_batch else {},
            "needs": sorted({need.partition(".")[0] for need in stage.needs if "." in need}),
        }
        for name, stage in plan.recipe.stages.items()
    }


def changes(plan: Plan, store: Folder) -> list[Change]:
    """What is to be done again compared with the newest snapshot of the store; everything, where there is none."""
    try:
        earlier = open_snapshot(store.url)
    except SnapshotError:
        return [Change("stage", name, tuple(plan.digests), ("the first run",)) for name in plan.recipe.stages]
    found: list[Change] = []
    before = earlier.provenance()
    facts = stage_facts(plan)
    inputs = _input_reasons(plan, earlier)
    reasons: dict[str, tuple[str, ...]] = {}
    for name in plan.recipe.stages:
        reasons[name] = _stage_reasons(name, facts, before, reasons)
        gated = plan.rules_before[name] > 0
        if gated:
            gate = _gate_reasons(plan, name, earlier, reasons)
            shards = plan.digests if reasons[name] or gate else [digest for digest in plan.digests if digest in inputs]
            why = (*reasons[name], *gate)
        else:
            shards = [digest for digest in plan.digests if not store.exists(plan.unit_path(name, digest))]
            why = reasons[name]
        told = why or tuple(dict.fromkeys(inputs.get(digest, "its units are gone") for digest in shards))
        if shards:
            found.append(Change("stage", name, tuple(shards), told, gated))
    rules = _rule_reasons(plan, earlier)
    judged = (*rules, *(f"stage {change.name} is measured again" for change in found), *dict.fromkeys(inputs.values()))
    gone = len(earlier.manifest["inputs"]) - sum(item["digest"] in plan.digests for item in earlier.manifest["inputs"])
    if gone and not inputs:
        judged = (*judged, f"{gone} input shards are no longer there")
    if judged:
        found.append(Change("judge", "", tuple(plan.digests), tuple(dict.fromkeys(judged))))
    pack = _differences("pack", earlier.manifest["recipe"].get("pack", {}), plan.recipe.resolved()["pack"])
    if pack:
        found.append(Change("pack", "", tuple(plan.digests), tuple(pack)))
    return found


def _input_reasons(plan: Plan, earlier: Snapshot) -> dict[str, str]:
    """Why each shard that the earlier run did not have is new, by digest."""
    known = {item["digest"] for item in earlier.manifest["inputs"]}
    places = {item["address"]: item["name"] for item in earlier.provenance()["inputs"]}
    return {
        digest: f"input {shard.name} {'has changed' if shard.address in places else 'is new'}"
        for shard, digest in zip(plan.shards, plan.digests, strict=True)
        if digest not in known
    }


def _stage_reasons(
    name: str, facts: Mapping[str, Any], before: Mapping[str, Any], reasons: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    now, was = facts[name], before.get("stages", {}).get(name)
    if was is None:
        return ("the stage is new",)
    told = _differences(name, {"type": was["type"], **was["options"]}, {"type": now["type"], **now["options"]})
    if was["version"] != now["version"]:
        told.append(f"{name} is version {now['version']}, was {was['version']}")
    if was["model"] != now["model"]:
        told.append(f"{name} has other weights: {str(now['model'])[:12]}, was {str(was['model'])[:12]}")
    told += _differences(f"numerics of {name}", was["numerics"], now["numerics"])
    if before.get("reader") != READER_VERSION:
        told.append(f"inputs are read by version {READER_VERSION}, was {before.get('reader')}")
    told += [f"it needs {need}, which is measured again" for need in now["needs"] if reasons.get(need)]
    return tuple(told)


def _gate_reasons(plan: Plan, name: str, earlier: Snapshot, reasons: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Why a gate may let other rows through: its rules, or the columns that they look at, have changed."""
    rules = list(plan.recipe.rules.items())[: plan.rules_before[name]]
    old = list(earlier.manifest["recipe"]["rules"].items())[: len(rules)]
    new = [(rule_name, {"type": rule.type, **rule.options()}) for rule_name, rule in rules]
    told = [] if _plain(old) == _plain(new) else ["the rules that it comes after have changed"]
    for rule_name, rule in rules:
        for stage in sorted({need.partition(".")[0] for need in rule.needs if "." in need}):
            if reasons.get(stage):
                told.append(f"rule {rule_name}, which it comes after, looks at {stage}, which is measured again")
    return tuple(told)


def _rule_reasons(plan: Plan, earlier: Snapshot) -> list[str]:
    old, new = earlier.manifest["recipe"]["rules"], plan.recipe.resolved()["rules"]
    told = [f"rule {name} is gone" for name in old if name not in new]
    for name, rule in new.items():
        told += _differences(f"rule {name}", old[name], rule) if name in old else [f"rule {name} is new"]
    both = [name for name in new if name in old]
    if both != [name for name in old if name in new]:
        told.append("the rules come in another order")
    held = earlier.manifest["recipe"]["held_out"]
    return told + _differences("held_out", held, plan.recipe.resolved()["held_out"])


def _differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys([*old, *new])
    return [
        f"{name}: {key} is {new.get(key)!r}, was {old.get(key)!r}"
        for key in keys
        if _plain(old.get(key)) != _plain(new.get(key))
    ]


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def told(found: list[Change], plan: Plan) -> list[str]:
    """The changes as lines of the plan."""
    names = dict(zip(plan.digests, (shard.name for shard in plan.shards), strict=True))
    lines = []
    for change in found:
        if len(change.shards) == len(plan.digests):
            where = f"all {len(plan.digests):,} shards"
        else:
            listed = ", ".join([*(names[digest] for digest in change.shards[:3]), "..."][: len(change.shards)])
            where = f"{len(change.shards):,} of {len(plan.digests):,} shards ({listed})"
        if change.after_gate:
            where = f"rows that its gate lets through and that were not measured so before, of {where}"
        lines.append(f"again     {f'{change.what} {change.name}'.strip()}: {where}; {'; '.join(change.why)}")
    return lines or ["again     nothing: everything is there"]
