"""Judging: the recipe's rules, in order, over measured columns; every row gets one verdict and its whole story.

Rows that could not be read or measured are failed. Then each rule sees the rows still alive at its step: a row rule
looks at rows one by one (the ledger keeps the first that failed and the list of all), a barrier at the small columns
of all rows alive. Nothing here reads an image or runs a model, so judging again with other thresholds takes seconds.

A stage that comes `after` some rules is measured only on rows that passed them. The same function, stopped after
those rules, says which; the errors of such a stage count from that step on and not before, so both runs see the same
rows at each step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pat

from cluster.storage import Folder
from pipelines.measure import READER_COLUMNS, read_columns, write_table
from pipelines.recipe import HeldOut
from pipelines.snapshot import open_snapshot
from stages.contract import digest_of
from stages.rules import OCCURRENCE, Rule, Verdicts

JUDGE_VERSION = 1

VERDICT_SCHEMA = pa.schema(
    [
        ("verdict", pa.string()),
        ("stage", pa.string()),
        ("rule", pa.string()),
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("failed_rules", pa.list_(pa.string())),
        ("keeper_uid", pa.string()),
        ("distance", pa.float64()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class JudgedShard:
    """Where one shard's rows and finished units lie in the store."""

    digest: str
    rows: str
    units: Mapping[str, str]


@dataclass(frozen=True)
class Gating:
    """For each stage, how many of the rules must be passed before it looks at a row (0: none)."""

    rules_before: Mapping[str, int]


class NotMeasuredError(ValueError):
    """Rows that would be alive now were never measured by a costly stage. `missing`: stage -> rows."""

    def __init__(self, missing: Mapping[str, int]) -> None:
        self.missing = dict(missing)
        listed = ", ".join(f"{count} rows by {stage}" for stage, count in missing.items())
        super().__init__(f"these rules revive rows that were never measured: {listed}")


@dataclass
class Judgement:
    """Verdicts over all rows of all shards, as arrays in shard order."""

    verdict: np.ndarray
    stage: list[str | None]
    rule: list[str | None]
    reason: list[str | None]
    value: np.ndarray
    threshold: np.ndarray
    failed_rules: list[list[str]]
    keeper: np.ndarray
    distance: np.ndarray
    funnel: dict[str, Any] = field(default_factory=dict)
    cuts: dict[str, Any] = field(default_factory=dict)


def evaluate(
    rules: Mapping[str, Rule],
    columns: Mapping[str, pa.ChunkedArray],
    errors: Mapping[str, list[str | None]],
    gating: Gating,
) -> Judgement:
    """Apply `rules` in order.

    columns: every column the rules need, of all rows. errors: of each stage, in recipe order.

    Raises NotMeasuredError where a rule needs a column of an alive row that a gate kept from being measured.
    """
    count = len(columns["uid"])
    judged = Judgement(
        verdict=np.full(count, "kept", dtype=object),
        stage=[None] * count,
        rule=[None] * count,
        reason=[None] * count,
        value=np.full(count, np.nan),
        threshold=np.full(count, np.nan),
        failed_rules=[[] for _ in range(count)],
        keeper=np.full(count, -1, np.int64),
        distance=np.full(count, np.nan),
    )
    alive = np.ones(count, bool)
    gated = {stage: np.array([_is_gate(error) for error in listed]) for stage, listed in errors.items()}
    steps = []
    for position, (name, rule) in enumerate([*rules.items(), ("", None)]):
        for stage, listed in errors.items():
            if gating.rules_before.get(stage, 0) == position:
                _fail(judged, alive, stage, listed, gated[stage])
        if rule is None:
            break
        _refuse_unmeasured(rule, alive, gated)
        before = int(alive.sum())
        _apply(judged, alive, name, rule, columns, gated)
        left = int(alive.sum())
        unjudged = sum(
            verdict == "failed" and at == name for verdict, at in zip(judged.verdict, judged.rule, strict=True)
        )
        steps.append(
            {
                "rule": name,
                "type": rule.type,
                "column": rule.needs[0],
                "threshold": rule.threshold_text(),
                "in": before,
                "rejected": before - left - unjudged,
                "failed": unjudged,
                "out": left,
            }
        )
    failures = Counter(
        f"{stage}: {reason}"
        for verdict, stage, reason in zip(judged.verdict, judged.stage, judged.reason, strict=True)
        if verdict == "failed"
    )
    judged.funnel = {
        "rows_in": count,
        "failed": int((judged.verdict == "failed").sum()),
        "rejected": int((judged.verdict == "rejected").sum()),
        "kept": int(alive.sum()),
        "failures": dict(sorted(failures.items())),
        "steps": steps,
    }
    check_balance(judged.funnel)
    return judged


def check_balance(funnel: Mapping[str, Any]) -> None:
    """Rows in = kept + rejected + failed, to the row; anything else is a broken program, not a user's mistake."""
    total = funnel["kept"] + funnel["rejected"] + funnel["failed"]
    if funnel["rows_in"] != total:
        raise RuntimeError(f"the funnel does not balance: {funnel['rows_in']} rows in, {total} accounted for")


def _is_gate(error: str | None) -> bool:
    return error is not None and error.startswith("not_measured(")


def _fail(judged: Judgement, alive: np.ndarray, stage: str, errors: list[str | None], gated: np.ndarray) -> None:
    for row in np.flatnonzero(alive).tolist():
        if errors[row] is not None and not gated[row]:
            judged.verdict[row], judged.stage[row], judged.reason[row] = "failed", stage, errors[row]
            alive[row] = False


def _stages_of(rule: Rule) -> set[str]:
    return {name.partition(".")[0] for name in rule.needs if "." in name}


def _refuse_unmeasured(rule: Rule, alive: np.ndarray, gated: Mapping[str, np.ndarray]) -> None:
    missing = {stage: int((gated[stage] & alive).sum()) for stage in sorted(_stages_of(rule)) if stage in gated}
    missing = {stage: rows for stage, rows in missing.items() if rows}
    if missing:
        raise NotMeasuredError(missing)


def _apply(
    judged: Judgement,
    alive: np.ndarray,
    name: str,
    rule: Rule,
    columns: Mapping[str, pa.ChunkedArray],
    gated: Mapping[str, np.ndarray],
) -> None:
    """One step: the rule's own answer for the rows it may see, laid into the judgement."""
    measured = np.ones(len(alive), bool)
    for stage in _stages_of(rule):
        measured &= ~gated.get(stage, np.zeros(len(alive), bool))
    # A row rule is evaluated wherever it can be, so that the ledger lists every rule that a row fails; failed rows have
    # nothing to evaluate. A barrier sees rows alive at this step alone.
    seen = np.flatnonzero(alive if rule.barrier else measured & (judged.verdict != "failed"))
    if not len(seen):
        return
    table = {column: to_numpy(columns[column].take(pa.array(seen))) for column in {*rule.needs, *OCCURRENCE}}
    answer = rule.judge(table)
    if answer.cut is not None:
        judged.cuts[name] = answer.cut
    for local in np.flatnonzero(answer.rejected).tolist():
        row = int(seen[local])
        judged.failed_rules[row].append(name)
        if alive[row]:
            _reject(judged, row, local, name, rule, answer, seen)
            alive[row] = False
    for local, reason in answer.failures.items():
        row = int(seen[local])
        if alive[row]:
            judged.verdict[row], judged.rule[row], judged.reason[row] = "failed", name, reason
            judged.stage[row] = rule.needs[0].partition(".")[0]
            alive[row] = False


def _reject(judged: Judgement, row: int, local: int, name: str, rule: Rule, answer: Verdicts, seen: np.ndarray) -> None:
    judged.verdict[row], judged.rule[row] = "rejected", name
    judged.stage[row] = rule.needs[0].partition(".")[0] if "." in rule.needs[0] else "read"
    judged.reason[row] = answer.reasons.get(local)
    judged.value[row], judged.threshold[row] = answer.value[local], answer.threshold
    if answer.keeper is not None and answer.keeper[local] >= 0:
        judged.keeper[row] = seen[answer.keeper[local]]
        judged.distance[row] = answer.distance[local] if answer.distance is not None else np.nan


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column as rules want it: integers stay exact where none is null, else floats with NaN; the rest are objects."""
    kind = column.type
    if pat.is_floating(kind):
        return column.cast(pa.float64()).to_numpy()
    if pat.is_integer(kind):
        return column.to_numpy() if column.null_count == 0 else column.cast(pa.float64()).to_numpy()
    values = np.empty(len(column), dtype=object)
    values[:] = column.to_pylist()
    return values


# --- held-out split --------------------------------------------------------------------------------------------------


def split_of_groups(
    held_out: HeldOut,
    image_ids: Sequence[str | None],
    keeper: np.ndarray,
    verdict: np.ndarray,
    inherited: Mapping[str, str],
) -> tuple[list[str | None], dict[str, Any]]:
    """The side, "train" or "held_out", of every row in a duplicate group whose keeper is kept; None for other rows.

    A group is a kept row and every row dropped for it, directly or through its keeper's keeper. A side is inherited
    from parent snapshots (image_id -> side), held-out winning where groups merge; else it is drawn by hash of the
    keeper's image, so that it depends on nothing but the image and the seed.
    """
    root = np.arange(len(keeper))
    for row in np.flatnonzero(keeper >= 0).tolist():
        top = row
        while keeper[top] >= 0:
            top = int(keeper[top])
        root[row] = top
    grouped = np.array([verdict[top] == "kept" for top in root], bool)
    sides: dict[int, str] = {}
    from_parents = 0
    for row in np.flatnonzero(grouped).tolist():
        side = inherited.get(image_ids[row] or "")
        if side and sides.get(int(root[row])) != "held_out":
            sides[int(root[row])] = side
    from_parents = len(sides)
    split: list[str | None] = [None] * len(keeper)
    for row in np.flatnonzero(grouped).tolist():
        top = int(root[row])
        if top not in sides:
            draw = int(hashlib.sha256(f"held-out {held_out.seed} {image_ids[top]}".encode()).hexdigest()[:15], 16)
            sides[top] = "held_out" if draw < held_out.fraction * 16**15 else "train"
        split[row] = sides[top]
    kept = np.flatnonzero(verdict == "kept").tolist()
    summary = {
        "fraction": held_out.fraction,
        "rows": sum(split[row] == "held_out" for row in kept),
        "groups": sum(side == "held_out" for side in sides.values()),
        "inherited": from_parents,
    }
    return split, summary


# --- over a store's finished units -----------------------------------------------------------------------------------


def _gather_columns(
    store: Folder, shards: Sequence[JudgedShard], rules: Mapping[str, Rule], stages: Sequence[str]
) -> tuple[dict[str, pa.ChunkedArray], dict[str, list[str | None]], list[int]]:
    """The small columns that `rules` need, of all shards; the errors of `stages`; and each shard's row count."""
    wanted = {name for rule in rules.values() for name in rule.needs if name not in ("image", "shard")}
    reader = sorted({"uid", "image_id", "index", "error"} | {name for name in wanted if name in READER_COLUMNS})
    parts: dict[str, list[pa.ChunkedArray]] = {}
    errors: dict[str, list[str | None]] = {"read": [], **{stage: [] for stage in stages}}
    counts = []
    for shard in shards:
        rows = read_columns(store, shard.rows, reader)
        counts.append(rows.num_rows)
        for name in reader:
            parts.setdefault(name, []).append(rows[name])
        parts.setdefault("shard", []).append(pa.chunked_array([pa.array([shard.digest] * rows.num_rows, pa.string())]))
        errors["read"].extend(rows["error"].to_pylist())
        for stage in stages:
            mine = sorted(name for name in wanted if name.partition(".")[0] == stage)
            table = read_columns(store, shard.units[stage], [*(name.partition(".")[2] for name in mine), "error"])
            for name in mine:
                parts.setdefault(name, []).append(table[name.partition(".")[2]])
            errors[stage].extend(table["error"].to_pylist())
    columns = {
        name: pa.chunked_array([chunk for part in chunked for chunk in part.chunks], type=chunked[0].type)
        for name, chunked in parts.items()
    }
    return columns, errors, counts


def judge_gate(
    store_url: str,
    shards: Sequence[JudgedShard],
    rules: Mapping[str, Rule],
    stages: Sequence[str],
    gating: Gating,
    paths: Sequence[str],
) -> list[str]:
    """Which rows the next stages may look at: writes one gate file a shard to `paths`, returns their digests."""
    store = Folder(store_url)
    columns, errors, counts = _gather_columns(store, shards, rules, stages)
    judged = evaluate(rules, columns, errors, gating)
    gates = [
        None if verdict == "kept" else f"not_measured({rule or stage})"
        for verdict, rule, stage in zip(judged.verdict, judged.rule, judged.stage, strict=True)
    ]
    digests = []
    first = 0
    for path, count in zip(paths, counts, strict=True):
        mine = gates[first : first + count]
        first += count
        write_table(store, path, pa.table({"gate": pa.array(mine, pa.string())}))
        digests.append(digest_of("gate", mine))
    return digests


def judge_all(
    store_url: str,
    shards: Sequence[JudgedShard],
    rules: Mapping[str, Rule],
    stages: Sequence[str],
    gating: Gating,
    held_out: HeldOut,
    parents: Sequence[str],
    paths: Sequence[str],
) -> dict[str, Any]:
    """The final verdicts: writes one verdict file a shard to `paths`; returns funnel, cuts, split and file digests.

    parents: snapshots whose sides of the held-out split are inherited. Rows that a rule needs and no stage has measured
    come back as {"missing": {stage: rows}}, since this runs in another process than the one that has to say so.
    """
    inherited: dict[str, str] = {}
    for parent in parents:
        for image_id, side in open_snapshot(parent).sides().items():
            if inherited.get(image_id) != "held_out":
                inherited[image_id] = side
    store = Folder(store_url)
    columns, errors, counts = _gather_columns(store, shards, rules, stages)
    try:
        judged = evaluate(rules, columns, errors, gating)
    except NotMeasuredError as problem:
        return {"missing": problem.missing}
    image_ids = columns["image_id"].to_pylist()
    split, held_out_summary = split_of_groups(held_out, image_ids, judged.keeper, judged.verdict, inherited)
    uids = columns["uid"].to_pylist()
    keeper_uid = [uids[row] if row >= 0 else None for row in judged.keeper]
    table = pa.table(
        {
            "verdict": pa.array(judged.verdict.tolist(), pa.string()),
            "stage": pa.array(judged.stage, pa.string()),
            "rule": pa.array(judged.rule, pa.string()),
            "reason": pa.array(judged.reason, pa.string()),
            "value": pa.array(judged.value, from_pandas=True),
            "threshold": pa.array(judged.threshold, from_pandas=True),
            "failed_rules": pa.array(judged.failed_rules, pa.list_(pa.string())),
            "keeper_uid": pa.array(keeper_uid, pa.string()),
            "distance": pa.array(judged.distance, from_pandas=True),
            "split": pa.array(split, pa.string()),
        },
        schema=VERDICT_SCHEMA,
    )
    digests, kept = [], []
    first = 0
    for path, count in zip(paths, counts, strict=True):
        part = table.slice(first, count)
        first += count
        write_table(store, path, part)
        digests.append(digest_of("verdicts", part.to_pylist()))
        kept.append(sum(verdict == "kept" for verdict in part["verdict"].to_pylist()))
    return {
        "funnel": judged.funnel,
        "cuts": judged.cuts,
        "held_out": held_out_summary,
        "digests": digests,
        "rows": counts,
        "kept": kept,
    }
