"""What a snapshot's page says, asked of its ledger with aggregate queries: memory does not grow with the rows.

Every number is counted in the ledger and held against the manifest; where the two disagree the page says so. Examples
are drawn by uid, which is a hash: an unbiased sample, and the same one each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.lineage.ledger import Ledger, quoted
from pipelines.report.plots import Bin

_EXAMPLE = """
    uid image_id shard key index member url verdict stage rule reason value threshold keeper_uid distance split
"""
EXAMPLE_COLUMNS = tuple(_EXAMPLE.split())
# What must not be shown: rows that these rules, or rules over a column of these stages, dropped; and rules whose names
# say as much.
WITHHOLDING_RULES = ("known_bad", "opt_out")
WITHHOLDING_STAGES = ("safety", "nudenet")
WITHHOLDING_WORDS = ("nsfw", "unsafe", "safety", "nude", "nudity", "porn", "violence", "takedown")
BINS = 36
FINE_BINS = 4096
# Reasons of one rule that a page lists, and rows shown of each.
CAUSES = 24
CAUSE_SHOTS = 10


@dataclass(frozen=True)
class Step:
    """One rule in the funnel. failed: rows it could not judge; failed_before: rows that broke since the step above."""

    name: str
    type: str
    column: str | None
    asked: str
    entering: int
    dropped: int
    failed: int
    leaving: int
    failed_before: int


@dataclass(frozen=True)
class Funnel:
    """The whole funnel. problems: sentences on every number that does not fit; none means it balances to the row."""

    rows_in: int
    kept: int
    rejected: int
    failed: int
    steps: Sequence[Step]
    problems: Sequence[str]


@dataclass
class Example:
    """One ledger row to show, with its caption and, for a duplicate, the row that was kept instead."""

    row: Mapping[str, Any]
    caption: str = ""
    keeper: Example | None = None
    shown: Any = None


@dataclass(frozen=True)
class Distribution:
    """How a rule's column is spread: bins with cuts for numbers, or counts of the commonest values for words."""

    rule: str
    column: str
    label: str
    bins: Sequence[Bin] = ()
    cuts: Sequence[tuple[float, str]] = ()
    categories: Sequence[tuple[str, int, int]] = ()
    clipped: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Cause:
    """Rows that one rule dropped for one reason, and a few of them."""

    reason: str
    rows: int
    examples: Sequence[Example]


@dataclass
class RuleFacts:
    """causes: for a rule over words (flaws, languages), its commonest reasons; empty where every row has its own."""

    step: Step
    distribution: Distribution | None = None
    causes: Sequence[Cause] = ()
    dropped: list[Example] = field(default_factory=list)
    kept: list[Example] = field(default_factory=list)
    kept_how: str = ""


def funnel(ledger: Ledger) -> Funnel:
    """The funnel as the ledger's rows tell it, held against the manifest's."""
    said = ledger.manifest.get("funnel", {})
    counted = ledger.rows("SELECT verdict, rule, count(*) AS rows FROM ledger GROUP BY verdict, rule")
    total = {verdict: sum(one["rows"] for one in counted if one["verdict"] == verdict) for verdict in _VERDICTS}
    rejected = {one["rule"]: one["rows"] for one in counted if one["verdict"] == "rejected"}
    broken = {one["rule"]: one["rows"] for one in counted if one["verdict"] == "failed" and one["rule"]}
    rows_in = sum(one["rows"] for one in counted)
    problems = []
    for word, there in (
        ("rows_in", rows_in),
        ("kept", total["kept"]),
        ("rejected", total["rejected"]),
        ("failed", total["failed"]),
    ):
        if word in said and said[word] != there:
            problems.append(f"The manifest says {word} {said[word]:,}; the ledger holds {there:,}.")
    steps: list[Step] = []
    alive = rows_in
    for step in ledger.steps:
        name, entering, leaving = str(step["rule"]), int(step["in"]), int(step["out"])
        dropped, failed = rejected.pop(name, 0), broken.pop(name, 0)
        if entering > alive:
            problems.append(f"{entering:,} rows enter {name!r}, but only {alive:,} were left.")
        if entering - dropped - failed != leaving:
            problems.append(
                f"Of {entering:,} rows that enter {name!r} the ledger drops {dropped:,} and fails {failed:,}, "
                f"which leaves {entering - dropped - failed:,}; the manifest says {leaving:,}."
            )
        steps.append(
            Step(
                name,
                str(step.get("type") or ""),
                step.get("column"),
                asked_text(ledger, step),
                entering,
                dropped,
                failed,
                leaving,
                max(alive - entering, 0),
            )
        )
        alive = leaving
    for name, count in rejected.items():
        problems.append(
            f"The ledger drops {count:,} rows by {name!r}, a rule that the manifest's funnel does not have."
        )
    in_rules = sum(step.failed + step.failed_before for step in steps) + max(alive - total["kept"], 0)
    if alive < total["kept"] or in_rules != total["failed"]:
        problems.append(
            f"{alive:,} rows pass the last rule and {total['kept']:,} are kept; {total['failed']:,} rows failed, and "
            f"the steps account for {in_rules:,}."
        )
    return Funnel(rows_in, total["kept"], total["rejected"], total["failed"], steps, problems)


_VERDICTS = ("kept", "rejected", "failed")
_WORDS = {"at_least": "at least", "at_most": "at most", "equals": "equal to", "one_of": "one of"}


def asked_text(ledger: Ledger, step: Mapping[str, Any]) -> str:
    """What a rule asks, in words: "at least 64 px", "top 90 %: at least 3.66", "missing"."""
    options = ledger.manifest.get("recipe", {}).get("rules", {}).get(step["rule"], {})
    unit = str(ledger.measured.get(str(step.get("column")), {}).get("unit") or "")
    unit = f" {unit}" if unit and len(unit) <= 12 else ""
    if step.get("type") == "threshold" and isinstance(options, Mapping):
        parts = []
        for name, word in _WORDS.items():
            value = options.get(name)
            if value is not None:
                parts.append(f"{word} {f'{value:g}{unit}' if isinstance(value, int | float) else value}")
        if options.get("is_null") is not None:
            parts.append("none found" if options["is_null"] else "present")
        if parts:
            return " and ".join(parts)
    cut = ledger.manifest.get("cuts", {}).get(step["rule"]) or {}
    if step.get("type") == "top_fraction" and cut.get("fraction") is not None:
        found = f": at least {cut['cut']:.4g}" if cut.get("cut") is not None else ""
        return f"top {100 * cut['fraction']:g} %{found}"
    return str(step.get("threshold") or "")


def cuts_of(ledger: Ledger, rule: str) -> list[tuple[float, str]]:
    """The numbers a rule cuts at, with words to write beside the line."""
    options = ledger.manifest.get("recipe", {}).get("rules", {}).get(rule, {})
    if options.get("type") == "quantile":
        options = ledger.manifest.get("cuts", {}).get(rule) or {}
    found = [
        (float(options[name]), f"{word} {options[name]:.4g}")
        for name, word in (("at_least", "at least"), ("at_most", "at most"))
        if isinstance(options.get(name), int | float)
    ]
    cut = (ledger.manifest.get("cuts", {}).get(rule) or {}).get("cut")
    if isinstance(cut, int | float):
        found.append((float(cut), f"cut {cut:.4g}"))
    return found


def distribution(ledger: Ledger, step: Step) -> Distribution | None:
    """The spread of what `step` judges by, split into kept, dropped by this rule, and ended elsewhere."""
    if step.type.endswith("_duplicates"):
        return _distances(ledger, step)
    if not step.column or step.column not in ledger.columns:
        return None
    about = ledger.measured.get(step.column, {})
    unit = str(about.get("unit") or about.get("scale") or "")
    label = f"{step.column} ({unit})" if unit else step.column
    missing = ledger.rows(f"SELECT count(*) AS rows FROM ledger WHERE {quoted(step.column)} IS NULL")[0]["rows"]
    if not ledger.number_column(step.column):
        return _categories(ledger, step, label)
    column = quoted(step.column)
    if "int" in str(ledger.columns[step.column]):
        number, finite = f"CAST({column} AS DOUBLE)", f"{column} IS NOT NULL"
    else:
        number, finite = f"CAST({column} AS DOUBLE)", f"isfinite({column})"
    ends = ledger.rows(f"SELECT min({number}) AS low, max({number}) AS high FROM ledger WHERE {finite}")[0]
    if ends["low"] is None:
        return None
    cuts = cuts_of(ledger, step.name)
    whole = "int" in str(ledger.columns[step.column])
    low, high = _span(ledger, number, finite, float(ends["low"]), float(ends["high"]), cuts)
    bins, clipped = _bins(ledger, step.name, number, finite, low, high, whole)
    return Distribution(step.name, step.column, label, bins, cuts, clipped=clipped, missing=missing)


def _span(
    ledger: Ledger, number: str, finite: str, low: float, high: float, cuts: Sequence[tuple[float, str]]
) -> tuple[float, float]:
    """The middle 99 % of the values, widened to hold the cuts: one huge picture must not squeeze all others."""
    if low == high:
        return low - 0.5, high + 0.5
    counted = ledger.rows(
        f"SELECT CAST(least(floor(({number} - ?) / ? * {FINE_BINS}), {FINE_BINS - 1}) AS INTEGER) AS place, "
        f"count(*) AS rows FROM ledger WHERE {finite} GROUP BY place ORDER BY place",
        [low, high - low],
    )
    total, seen = sum(one["rows"] for one in counted), 0
    width = (high - low) / FINE_BINS
    first, last = low, high
    for one in counted:
        if seen <= 0.005 * total:
            first = low + one["place"] * width
        seen += one["rows"]
        if seen >= 0.995 * total:
            last = low + (one["place"] + 1) * width
            break
    # Cutting ends off is worth it only where they are far away.
    if last - first > 0.6 * (high - low):
        first, last = low, high
    values = [value for value, _ in cuts]
    first, last = min([first, *values]), max([last, *values])
    margin = 0.02 * (last - first)
    return first - margin, last + margin


def _bins(
    ledger: Ledger, rule: str, number: str, finite: str, low: float, high: float, whole: bool
) -> tuple[list[Bin], int]:
    count = BINS
    if whole and high - low < 2 * BINS:
        low, high = float(int(low)) - 0.5, float(int(high + 1)) + 0.5
        count = int(high - low)
    width = (high - low) / count
    counted = ledger.rows(
        f"SELECT CAST(greatest(least(floor(({number} - ?) / ?), {count - 1}), 0) AS INTEGER) AS place, "
        "CASE WHEN verdict = 'kept' THEN 0 WHEN rule = ? AND verdict = 'rejected' THEN 1 ELSE 2 END AS fate, "
        f"count(*) AS rows, count(*) FILTER (WHERE {number} < ? OR {number} >= ?) AS beyond "
        f"FROM ledger WHERE {finite} GROUP BY place, fate ORDER BY place, fate",
        [low, width, rule, low, high],
    )
    table = [[0, 0, 0] for _ in range(count)]
    for one in counted:
        table[one["place"]][one["fate"]] = one["rows"]
    bins = [Bin(low + place * width, low + (place + 1) * width, *counts) for place, counts in enumerate(table)]
    return bins, sum(one["beyond"] for one in counted)


def _distances(ledger: Ledger, step: Step) -> Distribution | None:
    counted = ledger.rows(
        "SELECT CAST(floor(distance) AS INTEGER) AS place, count(*) AS rows FROM ledger "
        "WHERE rule = ? AND verdict = 'rejected' AND distance IS NOT NULL GROUP BY place ORDER BY place LIMIT 200",
        [step.name],
    )
    options = ledger.manifest.get("recipe", {}).get("rules", {}).get(step.name, {})
    radius = options.get("radius")
    if not counted or radius is None:
        return None
    by_place = {one["place"]: one["rows"] for one in counted}
    last = max(int(radius), max(by_place)) + 1
    bins = [Bin(place - 0.5, place + 0.5, 0, by_place.get(place, 0), 0) for place in range(last + 1)]
    cuts = [(float(radius) + 0.5, f"radius {radius}")]
    return Distribution(step.name, "distance", "distance to the keeper (bits)", bins, cuts)


def _categories(ledger: Ledger, step: Step, label: str) -> Distribution | None:
    column = quoted(str(step.column))
    counted = ledger.rows(
        f"SELECT CAST({column} AS VARCHAR) AS word, count(*) FILTER (WHERE verdict = 'kept') AS kept, count(*) AS rows "
        f"FROM ledger GROUP BY word ORDER BY rows DESC, word NULLS FIRST LIMIT 12"
    )
    words = [
        ("(none)" if one["word"] is None else str(one["word"])[:60], one["kept"], one["rows"] - one["kept"])
        for one in counted
    ]
    return Distribution(step.name, str(step.column), label, categories=words) if words else None


def examples(
    ledger: Ledger,
    condition: str,
    values: Sequence[Any],
    limit: int,
    seed: str = "",
    nearest: tuple[str, float] | None = None,
) -> list[Example]:
    """Up to `limit` rows that meet `condition`, by uid from a place that `seed` picks.

    nearest: a column of numbers and a value; rows closest to it come first.
    """
    columns = _shown_columns(ledger)
    start = hashlib.sha256(seed.encode()).hexdigest()[:32]
    order, bound = ("", []) if nearest is None else (f"abs(CAST({quoted(nearest[0])} AS DOUBLE) - ?), ", [nearest[1]])
    rows = ledger.rows(
        f"SELECT {columns} FROM ledger WHERE {condition} "
        f'ORDER BY {order}uid < ?, uid, shard, "index" LIMIT {int(limit)}',
        [*values, *bound, start],
    )
    captions = captions_of(ledger, [row["uid"] for row in rows])
    return [Example(row, "" if row["withheld"] else captions.get(row["uid"], "")) for row in rows]


def withholding(ledger: Ledger) -> tuple[list[str], list[str]]:
    """Rules whose dropped rows no page may show, and the columns that those of them judge by which measure safety."""
    recipe = ledger.manifest.get("recipe", {})
    stages, rules = recipe.get("stages", {}), recipe.get("rules", {})
    names, columns = [], []
    for step in ledger.steps:
        name, column = str(step["rule"]), str(step.get("column") or "")
        measures_safety = stages.get(column.partition(".")[0], {}).get("type") in WITHHOLDING_STAGES
        said = f"{name} {column}".lower()
        if (
            rules.get(name, {}).get("type", step.get("type")) in WITHHOLDING_RULES
            or measures_safety
            or any(word in said for word in WITHHOLDING_WORDS)
        ):
            names.append(name)
            if measures_safety and column in ledger.columns:
                columns.append(column)
    return names, columns


def _shown_columns(ledger: Ledger) -> str:
    """The columns of an example as SQL. `withheld`: a rule of `withholding` dropped the row, be it first or after
    another, or could not look at it since it had been dropped before."""
    names, columns = withholding(ledger)
    texts = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
    conditions = [f"rule IN ({texts})"] if names else []
    if names and "failed_rules" in ledger.columns:
        conditions.append(f"list_has_any(failed_rules, [{texts}])")
    conditions += [f"(verdict <> 'kept' AND {quoted(column)} IS NULL)" for column in columns]
    withheld = " OR ".join(f"coalesce({condition}, false)" for condition in conditions) or "false"
    chosen = ", ".join(quoted(name) for name in EXAMPLE_COLUMNS if name in ledger.columns)
    return f"{chosen}, ({withheld}) AS withheld"


def captions_of(ledger: Ledger, uids: Sequence[str]) -> dict[str, str]:
    """uid -> original caption."""
    wanted = sorted(set(filter(None, uids)))
    if not wanted:
        return {}
    places = ", ".join("?" for _ in wanted)
    rows = ledger.rows(
        f"SELECT uid, min(text) AS text FROM captions WHERE source = 'original' AND uid IN ({places}) GROUP BY uid",
        wanted,
    )
    return {row["uid"]: row["text"] or "" for row in rows}


def add_keepers(ledger: Ledger, many: Sequence[Example]) -> None:
    """Put the row that was kept instead beside each duplicate, in one query."""
    wanted = sorted({str(one.row["keeper_uid"]) for one in many if one.row.get("keeper_uid")})
    if not wanted:
        return
    columns = _shown_columns(ledger)
    places = ", ".join("?" for _ in wanted)
    rows = ledger.rows(
        f"SELECT {columns} FROM ledger WHERE uid IN ({places}) ORDER BY verdict <> 'kept', shard, \"index\"", wanted
    )
    captions = captions_of(ledger, wanted)
    for one in many:
        dropped = one.row
        found = next(
            (
                row
                for row in rows
                if row["uid"] == dropped.get("keeper_uid")
                and (row["shard"], row["index"]) != (dropped["shard"], dropped["index"])
                and row["rule"] != dropped["rule"]
            ),
            None,
        )
        if found:
            one.keeper = Example(found, "" if found["withheld"] else captions.get(found["uid"], ""))


def causes_of(ledger: Ledger, step: Step) -> list[Cause]:
    """The reasons a rule over a column of words gave, the commonest first, each with up to CAUSE_SHOTS rows."""
    if step.type.endswith("_duplicates") or not step.column or ledger.number_column(step.column):
        return []
    counted = ledger.rows(
        "SELECT reason, count(*) AS rows FROM ledger WHERE verdict = 'rejected' AND rule = ? AND reason IS NOT NULL "
        f"GROUP BY reason ORDER BY rows DESC, reason LIMIT {CAUSES}",
        [step.name],
    )
    chosen = "verdict = 'rejected' AND rule = ? AND reason = ?"
    return [
        Cause(one["reason"], one["rows"], examples(ledger, chosen, [step.name, one["reason"]], CAUSE_SHOTS))
        for one in counted
    ]


def rule_facts(ledger: Ledger, step: Step, shots: int) -> RuleFacts:
    """A rule's spread and its examples: dropped ones by uid; kept ones nearest the cut where there is one."""
    facts = RuleFacts(step, distribution(ledger, step), causes_of(ledger, step))
    facts.dropped = examples(ledger, "verdict = 'rejected' AND rule = ?", [step.name], shots, f"dropped {step.name}")
    add_keepers(ledger, facts.dropped)
    cuts = cuts_of(ledger, step.name)
    if ledger.number_column(step.column) and cuts and not step.type.endswith("_duplicates"):
        nearest = (str(step.column), cuts[0][0])
        facts.kept = examples(ledger, "verdict = 'kept'", [], shots, step.name, nearest)
        facts.kept_how = "Kept, nearest the cut"
        values = _values(ledger, str(step.column), facts.kept)
        for one in facts.kept:
            one.shown = values.get((one.row["shard"], one.row["index"]))
    elif not step.type.endswith("_duplicates"):
        facts.kept = examples(ledger, "verdict = 'kept'", [], shots, f"kept {step.name}")
        facts.kept_how = "Kept"
    for one in facts.dropped:
        one.shown = one.row["value"]
    return facts


def _values(ledger: Ledger, column: str, many: Sequence[Example]) -> dict[tuple[str, int], Any]:
    if not many:
        return {}
    places = ", ".join("?" for _ in many)
    rows = ledger.rows(
        f'SELECT shard, "index", {quoted(column)} AS shown FROM ledger WHERE uid IN ({places})',
        [one.row["uid"] for one in many],
    )
    return {(row["shard"], row["index"]): row["shown"] for row in rows}


def failures(ledger: Ledger, limit: int = 40) -> tuple[list[dict[str, Any]], int]:
    """(stage, reason, rows, a few keys) of the commonest failures, and how many kinds there are in all."""
    rows = ledger.rows(
        'SELECT stage, reason, count(*) AS rows, arg_min("key", uid || shard || "index", 3) AS keys FROM ledger '
        f"WHERE verdict = 'failed' GROUP BY stage, reason ORDER BY rows DESC, stage, reason LIMIT {int(limit)}"
    )
    kinds = ledger.rows(
        "SELECT count(*) AS kinds FROM (SELECT DISTINCT stage, reason FROM ledger WHERE verdict = 'failed')"
    )
    return rows, kinds[0]["kinds"]


def caption_rows(ledger: Ledger, many: Sequence[Example]) -> dict[str, list[dict[str, Any]]]:
    """uid -> every caption of these rows, originals first."""
    wanted = sorted({one.row["uid"] for one in many})
    if not wanted:
        return {}
    places = ", ".join("?" for _ in wanted)
    rows = ledger.rows(
        f"SELECT DISTINCT * FROM captions WHERE uid IN ({places}) ORDER BY source <> 'original', caption_id", wanted
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["uid"], []).append(row)
    return found


def splits(ledger: Ledger) -> dict[str, int]:
    """Kept rows by split, counted in the ledger."""
    rows = ledger.rows(
        "SELECT split, count(*) AS rows FROM ledger WHERE verdict = 'kept' GROUP BY split ORDER BY split"
    )
    return {row["split"] or "none": row["rows"] for row in rows}
