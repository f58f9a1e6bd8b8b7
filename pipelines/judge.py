"""Judging: the recipe's rules, in order, over measured columns; every row gets one verdict and its whole story.

Rows that could not be read or measured are failed. Then each rule sees the rows still alive at its step: a row rule
looks at rows one by one (the ledger keeps the first that failed and the list of all), a barrier at the small columns
of all rows alive. Nothing here reads an image or runs a model, so judging again with other thresholds takes seconds.

Here is what happens to the rows of one piece, a run of consecutive shards: `advance` takes them through the rules up to
the next barrier, whose answer comes from elsewhere (pipelines.barriers), and is laid in by `lay`. pipelines.judging
drives the pieces.

A stage that comes `after` some rules is measured only on rows that passed them. The same function, stopped after
those rules, says which; the errors of such a stage count from that step on and not before, so both runs see the same
rows at each step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from cluster.storage import Folder
from pipelines.measure import READER_COLUMNS, read_columns
from pipelines.recipe import HeldOut
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


ANSWER_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("rejected", pa.bool_()),
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("keeper", pa.int64()),
        ("keeper_uid", pa.string()),
        ("distance", pa.float64()),
        ("failed", pa.bool_()),
        ("recorded", pa.int64()),
    ]
)


@dataclass(frozen=True)
class JudgedShard:
    """Where one shard's rows and finished units lie in the store."""

    digest: str
    rows: str
    units: Mapping[str, str]
    dataset: str = ""


class NotMeasuredError(ValueError):
    """Rows that would be alive now were never measured by a costly stage. `missing`: stage -> rows."""

    def __init__(self, missing: Mapping[str, int]) -> None:
        self.missing = dict(missing)
        listed = ", ".join(f"{count} rows by {stage}" for stage, count in missing.items())
        super().__init__(f"these rules revive rows that were never measured: {listed}")


class Steps(TypedDict):
    """What one rule did to some rows."""

    rows_in: int
    rejected: int
    failed: int


@dataclass
class Answer:
    """What a rule said about the rows that it rejected or could not judge, and, if it records a number of each row,
    about all it saw; arrays and lists of the same length.

    row: position in the piece. keeper: id of the row kept instead, -1 for none; keeper_uid: None for none. recorded: -1
    for none.
    """

    row: np.ndarray
    rejected: np.ndarray
    reason: list[str | None]
    value: np.ndarray
    threshold: np.ndarray
    keeper: np.ndarray
    keeper_uid: list[str | None]
    distance: np.ndarray
    failed: np.ndarray
    recorded: np.ndarray

    @classmethod
    def none(cls) -> Answer:
        return cls.from_table(ANSWER_SCHEMA.empty_table())

    @classmethod
    def from_table(cls, table: pa.Table) -> Answer:
        lists = {name: table[name].to_pylist() for name in ("reason", "keeper_uid")}
        return cls(**lists, **{name: table[name].to_numpy() for name in ANSWER_SCHEMA.names if name not in lists})

    def to_table(self) -> pa.Table:
        return pa.table({name: getattr(self, name) for name in ANSWER_SCHEMA.names}, schema=ANSWER_SCHEMA)

    @classmethod
    def of(cls, found: Verdicts, rows: np.ndarray, ids: np.ndarray, uids: np.ndarray) -> Answer:
        """A rule's verdicts over rows with these positions, ids and uids."""
        failed = np.zeros(len(rows), bool)
        failed[list(found.failures)] = True
        failed &= ~found.rejected
        told = np.flatnonzero(found.rejected | failed if found.recorded is None else np.ones(len(rows), bool))
        keeper = found.keeper[told] if found.keeper is not None else np.full(len(told), -1)
        distance = found.distance[told] if found.distance is not None else np.full(len(told), np.nan)
        return cls(
            row=rows[told],
            rejected=found.rejected[told],
            reason=[found.failures[row] if failed[row] else found.reasons.get(row) for row in told.tolist()],
            value=found.value[told],
            threshold=np.full(len(told), found.threshold, np.float64),
            keeper=np.where(keeper >= 0, ids[keeper], -1) if len(ids) else keeper,
            keeper_uid=[uids[row] if row >= 0 else None for row in keeper.tolist()],
            distance=np.where(keeper >= 0, distance, np.nan),
            failed=failed[told],
            recorded=found.recorded[told] if found.recorded is not None else np.full(len(told), -1),
        )


@dataclass
class Judgement:
    """Verdicts so far over the rows of one piece. keeper: id of the row kept instead, -1 for none. recorded: by
    `<rule>.<name>`, what rules recorded of rows, -1 where nothing."""

    verdict: np.ndarray
    stage: list[str | None]
    rule: list[str | None]
    reason: list[str | None]
    value: np.ndarray
    threshold: np.ndarray
    failed_rules: list[list[str]]
    keeper: np.ndarray
    keeper_uid: list[str | None]
    distance: np.ndarray
    recorded: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def begin(cls, count: int) -> Judgement:
        return cls(
            verdict=np.full(count, "kept", dtype=object),
            stage=[None] * count,
            rule=[None] * count,
            reason=[None] * count,
            value=np.full(count, np.nan),
            threshold=np.full(count, np.nan),
            failed_rules=[[] for _ in range(count)],
            keeper=np.full(count, -1, np.int64),
            keeper_uid=[None] * count,
            distance=np.full(count, np.nan),
        )

    @property
    def alive(self) -> np.ndarray:
        return self.verdict == "kept"

    def to_table(self) -> pa.Table:
        """As it is kept between steps; the fields of VERDICT_SCHEMA but the split, and the keeper's id."""
        return pa.table(
            {
                "verdict": pa.array(self.verdict.tolist(), pa.string()),
                "stage": pa.array(self.stage, pa.string()),
                "rule": pa.array(self.rule, pa.string()),
                "reason": pa.array(self.reason, pa.string()),
                "value": pa.array(self.value, from_pandas=True),
                "threshold": pa.array(self.threshold, from_pandas=True),
                "failed_rules": pa.array(self.failed_rules, pa.list_(pa.string())),
                "keeper": pa.array(self.keeper),
                "keeper_uid": pa.array(self.keeper_uid, pa.string()),
                "distance": pa.array(self.distance, from_pandas=True),
                **{name: pa.array(values, pa.int64()) for name, values in self.recorded.items()},
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Judgement:
        def floats(name: str) -> np.ndarray:
            return to_numpy(table[name].cast(pa.float64())).copy()

        return cls(
            verdict=to_numpy(table["verdict"]),
            stage=table["stage"].to_pylist(),
            rule=table["rule"].to_pylist(),
            reason=table["reason"].to_pylist(),
            value=floats("value"),
            threshold=floats("threshold"),
            failed_rules=table["failed_rules"].to_pylist(),
            keeper=table["keeper"].to_numpy().copy(),
            keeper_uid=table["keeper_uid"].to_pylist(),
            distance=floats("distance"),
            recorded={name: table[name].to_numpy().copy() for name in table.column_names if "." in name},
        )

    def fail_unmeasured(self, stage: str, errors: Sequence[str | None]) -> None:
        """Rows still alive that `stage` could not measure are failed; gated ones wait for a rule that needs them."""
        alive = self.alive
        for row, error in enumerate(errors):
            if error is not None and alive[row] and not _is_gate(error):
                self.verdict[row], self.stage[row], self.reason[row] = "failed", stage, error

    def lay(self, name: str, rule: Rule, answer: Answer) -> None:
        """One rule's answer: the first rule to reject a row decides, the others are listed."""
        alive = self.alive
        source = rule.needs[0].partition(".")[0] if "." in rule.needs[0] else "read"
        if rule.records:
            recorded = self.recorded.setdefault(f"{name}.{rule.records.name}", np.full(len(alive), -1, np.int64))
            recorded[answer.row] = answer.recorded
        for place, row in enumerate(answer.row.tolist()):
            if answer.rejected[place]:
                self.failed_rules[row].append(name)
            answered = answer.failed[place] or (answer.rejected[place] and not rule.marks)
            if not alive[row] or not answered:
                continue
            self.rule[row], self.reason[row] = name, answer.reason[place]
            if not answer.rejected[place]:
                self.verdict[row], self.stage[row] = "failed", rule.needs[0].partition(".")[0]
                continue
            self.verdict[row], self.stage[row] = "rejected", source
            self.value[row], self.threshold[row] = answer.value[place], answer.threshold[place]
            self.keeper[row], self.keeper_uid[row] = answer.keeper[place], answer.keeper_uid[place]
            self.distance[row] = answer.distance[place]


@dataclass
class Advanced:
    """Where a piece stands: the position of the barrier that must answer next (the number of rules: at the end), what
    each rule did, and where a rule needs rows that were never measured, its position and how many by stage."""

    position: int
    steps: dict[int, Steps] = field(default_factory=dict)
    missing: tuple[int, dict[str, int]] | None = None


def advance(
    judged: Judgement,
    rules: Sequence[tuple[str, Rule]],
    columns: Mapping[str, pa.ChunkedArray],
    errors: Mapping[str, Sequence[str | None]],
    rules_before: Mapping[str, int],
    first: int = 0,
    answer: Answer | None = None,
) -> Advanced:
    """Take rows through `rules` from position `first` up to the next barrier without an answer.

    columns: every column the rules on the way need. errors: of each stage, in recipe order; they count from the step on
    that the stage looks at rows (rules_before). answer: of the barrier at `first`, for these rows.
    """
    done = Advanced(first)
    gated = {stage: np.array([_is_gate(error) for error in listed], bool) for stage, listed in errors.items()}
    for position in range(first, len(rules) + 1):
        done.position = position
        if answer is None:
            for stage, listed in errors.items():
                if rules_before.get(stage, 0) == position:
                    judged.fail_unmeasured(stage, listed)
            if position == len(rules):
                break
            missing = _unmeasured(rules[position][1], judged.alive, gated)
            if missing:
                done.missing = (position, missing)
                break
            if rules[position][1].barrier:
                break
        name, rule = rules[position]
        alive_before = judged.alive
        judged.lay(name, rule, answer if answer is not None else _look(judged, rule, columns, gated))
        answer = None
        rejected = int((alive_before & (judged.verdict == "rejected")).sum())
        failed = int((alive_before & (judged.verdict == "failed")).sum())
        done.steps[position] = {"rows_in": int(alive_before.sum()), "rejected": rejected, "failed": failed}
    return done


def check_balance(funnel: Mapping[str, Any]) -> None:
    """Rows in = kept + rejected + failed, to the row; anything else is a broken program, not a user's mistake."""
    total = funnel["kept"] + funnel["rejected"] + funnel["failed"]
    if funnel["rows_in"] != total:
        raise RuntimeError(f"the funnel does not balance: {funnel['rows_in']} rows in, {total} accounted for")


def _is_gate(error: str | None) -> bool:
    return error is not None and error.startswith("not_measured(")


def _stages_of(rule: Rule) -> set[str]:
    return {name.partition(".")[0] for name in rule.needs if "." in name}


def _unmeasured(rule: Rule, alive: np.ndarray, gated: Mapping[str, np.ndarray]) -> dict[str, int]:
    missing = {stage: int((gated[stage] & alive).sum()) for stage in sorted(_stages_of(rule)) if stage in gated}
    return {stage: rows for stage, rows in missing.items() if rows}


def _look(
    judged: Judgement, rule: Rule, columns: Mapping[str, pa.ChunkedArray], gated: Mapping[str, np.ndarray]
) -> Answer:
    """What a row rule says. It is asked wherever it can be, so that the ledger lists every rule that a row fails;
    failed rows have nothing to ask about."""
    measured = judged.verdict != "failed"
    for stage in _stages_of(rule):
        if stage in gated:
            measured = measured & ~gated[stage]
    seen = np.flatnonzero(measured)
    if not len(seen):
        return Answer.none()
    table = table_of(columns, rule.needs, seen)
    return Answer.of(rule.judge(table), seen, seen, table["uid"])


def table_of(
    columns: Mapping[str, pa.ChunkedArray], needs: Sequence[str], rows: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The columns that a rule needs, and those of an occurrence, as numpy arrays."""
    taken = None if rows is None else pa.array(rows)
    return {
        name: to_numpy(columns[name] if taken is None else columns[name].take(taken)) for name in {*needs, *OCCURRENCE}
    }


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column as rules want it: integers stay exact where none is null, else floats with NaN; bytes of one length and
    vectors as (N, C) matrices, zeros or NaN where null; the rest are objects."""
    kind = column.type
    if pat.is_floating(kind):
        return column.cast(pa.float64()).to_numpy()
    if pat.is_integer(kind):
        return column.to_numpy() if column.null_count == 0 else column.cast(pa.float64()).to_numpy()
    if pat.is_fixed_size_binary(kind):
        filled = pc.fill_null(column, bytes(kind.byte_width)) if column.null_count else column
        return np.frombuffer(b"".join(filled.to_pylist()), np.uint8).reshape(len(column), kind.byte_width)
    if _is_vector(column):
        return _matrix(column)
    values = np.empty(len(column), dtype=object)
    values[:] = column.to_pylist()
    return values


def _is_vector(column: pa.ChunkedArray) -> bool:
    """Whether a column holds vectors of floats; lists of several lengths are none."""
    kind = column.type
    if not (pat.is_list(kind) or pat.is_fixed_size_list(kind)) or not pat.is_floating(kind.value_type):
        return False
    return len(pc.unique(pc.list_value_length(column.drop_null()))) <= 1


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(N, C) of a column of vectors of one length, in their own type; NaN where null. Raises ValueError."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    known = np.asarray(array.is_valid())
    flat = array.drop_null().flatten().to_numpy(zero_copy_only=False)
    if not known.any():
        return np.full((len(known), 0), np.nan, flat.dtype)
    width = len(flat) // int(known.sum())
    if len(flat) != width * int(known.sum()):
        raise ValueError("a column of vectors holds vectors of several lengths")
    if known.all():
        return flat.reshape(len(known), width)
    matrix = np.full((len(known), width), np.nan, flat.dtype)
    matrix[known] = flat.reshape(-1, width)
    return matrix


# --- held-out split --------------------------------------------------------------------------------------------------


def drawn_side(held_out: HeldOut, image_id: str | None) -> str:
    """The side of a group whose kept row has this image: by its hash and the seed, and nothing else."""
    draw = int(hashlib.sha256(f"held-out {held_out.seed} {image_id}".encode()).hexdigest()[:15], 16)
    return "held_out" if draw < held_out.fraction * 16**15 else "train"


def roots_of(rows: np.ndarray, keepers: np.ndarray) -> np.ndarray:
    """The id at the end of each row's chain of keepers. rows: ids of dropped rows, sorted; keepers: theirs."""
    roots = keepers.copy()
    while len(rows):
        place = np.minimum(np.searchsorted(rows, roots), len(rows) - 1)
        further = rows[place] == roots
        if not further.any():
            break
        roots[further] = keepers[place[further]]
    return roots


# --- over a store's finished units -----------------------------------------------------------------------------------


def gather_columns(
    store: Folder, shards: Sequence[JudgedShard], rules: Mapping[str, Rule], stages: Sequence[str]
) -> tuple[dict[str, pa.ChunkedArray], dict[str, list[str | None]], list[int]]:
    """The small columns that `rules` need, of these shards; the errors of `stages`; and each shard's row count."""
    wanted = {name for rule in rules.values() for name in rule.needs if name not in ("image", "shard", "dataset")}
    reader = sorted({"uid", "image_id", "index", "error"} | {name for name in wanted if name in READER_COLUMNS})
    parts: dict[str, list[pa.ChunkedArray]] = {}
    errors: dict[str, list[str | None]] = {"read": [], **{stage: [] for stage in stages}}
    counts = []
    for shard in shards:
        rows = read_columns(store, shard.rows, reader)
        counts.append(rows.num_rows)
        for name in reader:
            parts.setdefault(name, []).append(rows[name])
        for name, value in (("shard", shard.digest), ("dataset", shard.dataset or None)):
            constant = pa.array([value] * rows.num_rows, pa.string())
            parts.setdefault(name, []).append(pa.chunked_array([constant]))
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
