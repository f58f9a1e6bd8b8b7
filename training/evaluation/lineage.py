"""What the models of an evaluation came from: the snapshots behind them, and which judges had a hand in those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def snapshots_behind(model: Mapping[str, Any], catalog: Any, data: Any) -> dict[str, str]:
    """id -> address of every snapshot that a model learned from, its teachers' included.

    By the catalog where it knows the model; else what model.json says, which is found if it is the snapshot at hand.
    """
    from pipelines.lineage.questions import trace

    try:
        found = {one.digest: one.address for one in trace(catalog, model["digest"]).of_kind("snapshot")}
    except ValueError:  # the catalog does not know this model
        found = {}
    named = (model.get("lineage") or {}).get("snapshot")
    if named and named not in found:
        found[named] = ""
    return {name: data.folder.url if name == data.id else address for name, address in found.items()}


@dataclass(frozen=True)
class Independence:
    """Whether a judge had no hand in a model. why: what it did, where it had."""

    independent: bool
    why: str = ""


def independence(look_files: Mapping[str, str], model: Mapping[str, Any], snapshots: Mapping[str, str]) -> Independence:
    """A judge is not independent of a model whose data it filtered or whose drawings it chose.

    look_files: file name -> digest of the judge's weights. Weights are compared, never names.
    """
    own = {digest for name, digest in look_files.items() if not name.endswith((".json", ".txt"))}
    if not own:
        return Independence(True)
    chosen_by = (model.get("sampling") or {}).get("best_of") or {}
    if chosen_by.get("judge") in own:
        return Independence(False, f"chose the best of {chosen_by.get('n', '?')} drawings")
    for name, address in snapshots.items():
        stages = _filtered_by(address, own) if address else []
        if stages:
            return Independence(False, f"filtered snapshot {name[:12]} ({', '.join(stages)})")
    return Independence(True)


def _filtered_by(address: str, weights: set[str]) -> list[str]:
    """The stages of a snapshot with these weights whose columns some rule judged by, directly or through a stage."""
    from pipelines.snapshot import open_snapshot

    try:
        manifest = open_snapshot(address).manifest
    except (ValueError, OSError):
        return []
    own = [name for name, said in manifest.get("models", {}).items() if weights & set(said.get("files", {}).values())]
    recipe = manifest.get("recipe", {})
    judged = {str(rule.get("column", "")).partition(".")[0] for rule in recipe.get("rules", {}).values()}
    behind = {
        name: str(stage.get("embedding", "")).partition(".")[0] for name, stage in recipe.get("stages", {}).items()
    }
    used = judged | {behind[name] for name in judged if behind.get(name)}
    return [name for name in own if name in used]
