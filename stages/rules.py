"""Rules: cheap predicates over measured columns. They judge and never measure, so changing one costs no model a second.

    rules:
      short_side: {column: decode.short_side, at_least: 64}
      caption:    {column: text.flaw, is_null: true}
      aesthetic:  {type: top_fraction, column: aesthetic.score, fraction: 0.7}

A `Threshold` looks at one row. `TopFraction` here and the duplicate rules of `stages.dedupe` are barriers: they see the
small columns of every row still alive at their step, whatever the order or the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from stages.contract import Column

# Columns every barrier is given besides those it needs: an occurrence is the last tie-break everywhere.
OCCURRENCE = ("uid", "shard", "index")

Table = Mapping[str, np.ndarray]
Guide = Mapping[str, np.ndarray]


@dataclass
class Verdicts:
    """What a rule found over N rows (arrays of length N).

    rejected: bool. value: float64, NaN where the column holds no number. threshold: float64 or NaN. reasons: why, for
    rejected rows. failures: row -> reason, for rows whose value cannot be judged (NaN). keeper: index of the row kept
    instead, -1 for none, and its distance. cut: what the rule resolved to, for the manifest. recorded: the
    whole number that the rule `records` of every row it saw, -1 for none.
    """

    rejected: np.ndarray
    value: np.ndarray
    threshold: float = float("nan")
    reasons: Mapping[int, str] = field(default_factory=dict)
    failures: Mapping[int, str] = field(default_factory=dict)
    keeper: np.ndarray | None = None
    distance: np.ndarray | None = None
    cut: dict[str, Any] | None = None
    recorded: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of every rule. Fields are its options in a recipe.

    barrier: it sees all rows alive at its step together. guards: rows it drops are looked at by no costly stage and
    shown in no report (known-bad pictures, opt-outs). records: the column of whole numbers that it leaves in the
    ledger, as `<rule>.<name>`.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: ClassVar[str]
    version: ClassVar[int] = 1
    barrier: ClassVar[bool] = False
    # A separable barrier can be judged part by part: `part_of` says which rows never decide about each other.
    separable: ClassVar[bool] = False
    # What `part_of` and `judge_part` must be told of all rows: "" (nothing), "neighbours" or "clusters".
    guide: ClassVar[str] = ""
    # Whether rows of an earlier snapshot may stand in the table, marked as held.
    takes_held: ClassVar[bool] = False
    guards: ClassVar[bool] = False
    records: ClassVar[Column | None] = None

    @property
    def needs(self) -> tuple[str, ...]:
        raise NotImplementedError

    def judge(self, table: Table) -> Verdicts:
        """Judge the rows of `table`: all rows for a row rule, the rows alive at this step for a barrier."""
        raise NotImplementedError

    def part_of(self, table: Table, parts: int, guide: Guide) -> np.ndarray:
        """(N,) int64 part, 0 to `parts` - 1, of each row; `judge_part` of each part together is `judge` of all rows."""
        raise NotImplementedError

    def judge_part(self, table: Table, guide: Guide) -> Verdicts:
        """Judge the rows of one part. guide: what had to be known of all rows before, by name."""
        return self.judge(table)

    def threshold_text(self) -> str:
        """What is asked, in a few words, for funnels and reports."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Threshold(Rule):
    """Keeps rows whose column is at_least and/or at_most a number, equals a value, is one_of some (null may
    be one), or is (not) null."""

    type: ClassVar[str] = "threshold"
    column: str
    at_least: float | None = None
    at_most: float | None = None
    equals: bool | int | str | None = None
    one_of: tuple[str | None, ...] | None = None
    is_null: bool | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in (self.at_least, self.at_most, self.equals, self.one_of, self.is_null)):
            raise ValueError(
                f"a rule on {self.column!r} asks nothing: give at_least, at_most, equals, one_of or is_null"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def threshold_text(self) -> str:
        asked = {
            name: f"{value:g}" if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if name != "column" and value is not None
        }
        return ", ".join(f"{name} {value}" for name, value in asked.items())

    def judge(self, table: Table) -> Verdicts:
        column = table[self.column]
        if column.dtype == object or column.dtype.kind in "bUS":
            return self._judge_objects(column)
        value = column.astype(np.float64)
        below = value < self.at_least if self.at_least is not None else np.zeros(len(value), bool)
        above = value > self.at_most if self.at_most is not None else np.zeros(len(value), bool)
        unequal = value != self.equals if self.equals is not None else np.zeros(len(value), bool)
        unknown = np.isnan(value)
        rejected = (below | above | unequal) & ~unknown
        reasons = {}
        for row in np.flatnonzero(rejected):
            asked = (
                f"below {self.at_least:g}"
                if below[row]
                else f"above {self.at_most:g}"
                if above[row]
                else f"not {self.equals}"
            )
            reasons[int(row)] = f"{self.column} {value[row]:.6g} is {asked}"
        failures = {int(row): f"{self.column} is not a number" for row in np.flatnonzero(unknown)}
        bound = self.at_least if self.at_least is not None else self.at_most
        return Verdicts(rejected, value, float("nan") if bound is None else float(bound), reasons, failures)

    def _judge_objects(self, column: np.ndarray) -> Verdicts:
        reasons: dict[int, str] = {}
        for row, value in enumerate(column.tolist()):
            if self.is_null is True and value is not None:
                reasons[row] = f"{self.column}: {value}"
            elif self.is_null is False and value is None:
                reasons[row] = f"{self.column} is missing"
            elif self.equals is not None and value != self.equals:
                reasons[row] = f"{self.column} {value!r} is not {self.equals!r}"
            elif self.one_of is not None and value not in self.one_of:
                reasons[row] = f"{self.column} {value!r} is none of {', '.join(map(str, self.one_of))}"
        rejected = np.zeros(len(column), bool)
        rejected[list(reasons)] = True
        return Verdicts(rejected, np.full(len(column), np.nan), reasons=reasons)


def occurrence_order(table: Table, *leading: np.ndarray) -> np.ndarray:
    """Row indices sorted by `leading` keys (first is most important), then by occurrence (uid, shard, index)."""
    keys: Sequence[np.ndarray] = (*leading, *(_sortable(table[name]) for name in OCCURRENCE))
    return np.lexsort(tuple(reversed(keys)))


def _sortable(column: np.ndarray) -> np.ndarray:
    """Text as numpy sorts it; a shard may also be its rank among all shards, an integer."""
    return column.astype("U") if column.dtype == object else column


@dataclass(frozen=True, kw_only=True)
class TopFraction(Rule):
    """Keeps the k = floor(fraction * n) rows with the highest value, of the n alive rows with a finite one.

    Ties go by occurrence. A value that is not finite makes the row failed. The cut that came out joins the manifest.
    """

    type: ClassVar[str] = "top_fraction"
    barrier: ClassVar[bool] = True
    column: str
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction {self.fraction} of a top_fraction rule is not in (0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def threshold_text(self) -> str:
        return f"top {self.fraction:.4g} of those alive"

    def judge(self, table: Table) -> Verdicts:
        value = table[self.column].astype(np.float64)
        finite = np.isfinite(value)
        count = int(finite.sum())
        # A decimal fraction times n can land a hair under the whole number that is meant (0.7 * 10 = 6.999...).
        kept_count = int(np.floor(self.fraction * count + 1e-9))
        order = occurrence_order(table, np.where(finite, -value, np.inf))
        kept = order[:kept_count]
        rejected = finite.copy()
        rejected[kept] = False
        cut = float(value[kept[-1]]) if kept_count else float("nan")
        reasons = {
            int(row): f"{self.column} {value[row]:.6g} is not in the top {self.fraction:.4g} (cut {cut:.6g})"
            for row in np.flatnonzero(rejected)
        }
        failures = {int(row): f"{self.column} is not finite" for row in np.flatnonzero(~finite)}
        resolved = {"fraction": self.fraction, "cut": None if kept_count == 0 else cut, "kept": kept_count, "of": count}
        return Verdicts(rejected, value, cut, reasons, failures, cut=resolved)


@dataclass(frozen=True, kw_only=True)
class Quantile(Rule):
    """Keeps rows from the `at_least` quantile to the `at_most` quantile of the values alive at this step.

    Quantiles are values that occur (the inverse of the cumulative distribution), and rows that share one share its
    fate: so ties make it keep more than a top_fraction would. A value that is not finite makes the row failed. The cuts
    that came out join the manifest.
    """

    type: ClassVar[str] = "quantile"
    barrier: ClassVar[bool] = True
    column: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"a quantile rule on {self.column!r} asks nothing: give at_least or at_most")
        for name, share in (("at_least", self.at_least), ("at_most", self.at_most)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} {share} of a quantile rule is not in [0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def threshold_text(self) -> str:
        ends = (("from", self.at_least), ("to", self.at_most))
        return " ".join(f"{word} the {share:.4g} quantile" for word, share in ends if share is not None)

    def judge(self, table: Table) -> Verdicts:
        value = table[self.column].astype(np.float64)
        finite = np.isfinite(value)
        low, high = (self._cut(value[finite], share) for share in (self.at_least, self.at_most))
        below = finite & (value < (-np.inf if low is None else low))
        above = finite & (value > (np.inf if high is None else high))
        reasons = {
            int(row): f"{self.column} {value[row]:.6g} is below the {self.at_least:.4g} quantile (cut {low:.6g})"
            for row in np.flatnonzero(below)
        } | {
            int(row): f"{self.column} {value[row]:.6g} is above the {self.at_most:.4g} quantile (cut {high:.6g})"
            for row in np.flatnonzero(above)
        }
        failures = {int(row): f"{self.column} is not finite" for row in np.flatnonzero(~finite)}
        first = low if low is not None else high
        resolved = {"at_least": low, "at_most": high, "of": int(finite.sum())}
        return Verdicts(below | above, value, float("nan") if first is None else first, reasons, failures, cut=resolved)

    @staticmethod
    def _cut(value: np.ndarray, share: float | None) -> float | None:
        if share is None or not len(value):
            return None
        return float(np.quantile(value, share, method="inverted_cdf"))
