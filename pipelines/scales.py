"""Thresholds of another scale: 0.28 is ViT-B/32's CLIP score, and 0.5 means nothing on an aesthetic scale of 1 to 10.

A recipe that asks another model's score for one of ViT-B/32's well-known thresholds gets a warning with its plan. Where
both models have measured the same rows (a second `clip_score` stage with ViT-B-32, or a score that came with the data),
the warning names the threshold that keeps the same share of rows. A threshold outside the scale that its column tells
is named too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from cluster.storage import Folder
from pipelines.measure import READER_COLUMNS, read_columns
from pipelines.plan import Plan
from pipelines.recipe import Recipe
from stages.clip_score import ClipScore
from stages.rules import Threshold

# LAION-2B's and LAION-400M's cuts on ViT-B/32's cosine.
B32_CUTS = (0.28, 0.30)
MOST_ROWS = 1_000_000


def scale_warnings(plan: Plan, store: Folder) -> list[str]:
    """A sentence for every rule with a threshold that belongs to another scale than its column's."""
    return [*_clip_warnings(plan, store), *_range_warnings(plan.recipe)]


def _range_warnings(recipe: Recipe) -> list[str]:
    """Thresholds outside the range that a column's scale tells: no row falls under them, or every row does."""
    scales = {f"{name}.{column.name}": column.scale for name, stage in recipe.stages.items() for column in stage.adds}
    found = []
    for name, rule in recipe.rules.items():
        if not isinstance(rule, Threshold):
            continue
        told = re.search(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)", scales.get(rule.column, ""))
        for option in ("at_least", "at_most"):
            asked = getattr(rule, option)
            if told and asked is not None and not float(told[1]) <= asked <= float(told[2]):
                found.append(f"rules.{name}: {option} {asked:g} lies outside the scale of {rule.column}, {told.string}")
    return found


def _clip_warnings(plan: Plan, store: Folder) -> list[str]:
    """A sentence for every rule that asks a CLIP score for a threshold of another CLIP's scale."""
    stages = {name: stage for name, stage in plan.recipe.stages.items() if isinstance(stage, ClipScore)}
    found = []
    for name, rule in plan.recipe.rules.items():
        if not isinstance(rule, Threshold) or rule.at_least is None:
            continue
        stage_name, _, column = rule.column.partition(".")
        stage = stages.get(stage_name)
        asked = rule.at_least
        if stage is None or column != "score" or not B32_CUTS[0] <= asked <= B32_CUTS[1]:
            continue
        if stage.is_b32(plan.context):
            continue
        told = (
            f"rules.{name}: {asked:g} is a threshold of ViT-B/32's scale, and {rule.column} is {stage.model}'s; "
            "on another scale it keeps another share"
        )
        reference, scores = _both(plan, store, stage_name, stages)
        if len(scores):
            equal, share = equal_share_threshold(reference, scores, asked)
            told += f". Of {len(scores):,} rows that both have measured, ViT-B/32 keeps {100 * share:.1f} %"
            told += f"; write at_least: {equal:.4g} to keep as many" if equal is not None else ""
        else:
            told += (
                "; to find the threshold that keeps the same share, add a stage "
                "{type: clip_score, model: ViT-B-32, pretrained: openai}, run with --limit, and ask for the plan again"
            )
        found.append(told)
    return found


def equal_share_threshold(
    reference: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray, threshold: float
) -> tuple[float | None, float]:
    """(threshold on `scores` that as many rows reach as reach `threshold` on `reference`, that share of the rows).

    Both are of the same rows, without NaN. None where no row reaches the threshold. Ties may let more rows through.
    """
    reached = int((np.asarray(reference, np.float64) >= threshold).sum())
    share = reached / max(len(reference), 1)
    if not reached:
        return None, share
    return float(np.partition(np.asarray(scores, np.float64), -reached)[-reached]), share


def _both(plan: Plan, store: Folder, stage: str, stages: dict[str, ClipScore]) -> tuple[np.ndarray, np.ndarray]:
    """ViT-B/32's scores and `stage`'s of the rows that have both, from whatever units of the two are finished."""
    other = next((name for name, one in stages.items() if name != stage and one.is_b32(plan.context)), None)
    theirs = {}
    if other or "metadata" in READER_COLUMNS:
        theirs = _finished(store, plan.unit_path(other, "") if other else plan.rows_path(""))
    pairs: list[np.ndarray] = []
    rows = 0
    for shard, path in sorted(_finished(store, plan.unit_path(stage, "")).items()):
        if shard not in theirs or rows >= MOST_ROWS:
            continue
        scores = _floats(read_columns(store, path, ["score"])["score"].to_pylist())
        if other:
            reference = _floats(read_columns(store, theirs[shard], ["score"])["score"].to_pylist())
        else:
            reference = _floats(_told(store, theirs[shard]))
        known = np.isfinite(scores) & np.isfinite(reference)
        pairs.append(np.stack([reference[known], scores[known]]))
        rows += int(known.sum())
    both = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0))
    return both[0], both[1]


def _finished(store: Folder, path: str) -> dict[str, str]:
    """Shard digest -> path of every finished unit in the folder of `path`, whatever rows its gate let through."""
    files = store.files(path.rpartition("/")[0], "*.parquet", recursive=False)
    return {PurePosixPath(file.path).stem.partition("-")[0]: file.path for file in files}


def _floats(values: Sequence[object]) -> np.ndarray:
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], np.float64)


def _told(store: Folder, path: str) -> list[object]:
    """ViT-B/32's score as the dataset tells it, row by row."""
    texts = read_columns(store, path, ["metadata"])["metadata"].to_pylist()
    return [json.loads(text).get("clip_b32_score") if text else None for text in texts]
