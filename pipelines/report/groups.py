"""Who is kept: for each rule the share of rows it lets through, by concept cluster, language and source.

A filter that looks fair over all rows may empty one language or one concept. Counted in the ledger by group and by the
rule that ended a row, with one query a kind of group; failed rows were judged by nobody and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.lineage.ledger import Ledger, quoted

LISTED_GROUPS = 12
# Groups asked of the ledger, the largest first; and rows a group needs before its loss is worth a warning.
MOST_GROUPS = 20_000
WARN_ROWS = 10
# Stands for a column: the folder that a row's raw shard came from.
FOLDER = "folder of the raw shard"


@dataclass(frozen=True)
class Group:
    """Rows of one group. entering[i], leaving[i]: before and after rule i."""

    name: str
    entering: Sequence[int]
    leaving: Sequence[int]

    @property
    def kept(self) -> int:
        return self.leaving[-1]

    def shares(self) -> list[float | None]:
        """For each rule the share of the group's rows that pass it; None where none came so far."""
        return [after / before if before else None for before, after in zip(self.entering, self.leaving, strict=True)]


@dataclass(frozen=True)
class Grouping:
    """One kind of group. whole: all rows that belong to some group; effective: groups as exp(entropy), in and kept."""

    kind: str
    column: str
    rules: Sequence[str]
    whole: Group
    groups: Sequence[Group]
    count: int
    effective: tuple[float, float]
    warnings: Sequence[str]


def groupings(ledger: Ledger) -> list[Grouping]:
    """The kinds of groups that this ledger knows and that have two groups or more."""
    rules = [str(step["rule"]) for step in ledger.steps]
    if not rules:
        return []
    found = []
    for kind, columns in _kinds(ledger):
        made = (_grouping(ledger, kind, column, rules) for column in columns)
        # The first column that tells rows apart: a run of one dataset may still have several folders.
        first = next((one for one in made if one is not None), None)
        if first is not None:
            found.append(first)
    return found


def _kinds(ledger: Ledger) -> list[tuple[str, list[str]]]:
    """(kind, columns of the ledger by which rows can be grouped so, the best first)."""
    recipe = ledger.manifest.get("recipe", {})
    stages, rules = recipe.get("stages", {}), recipe.get("rules", {})
    clusters = [f"{name}.cluster" for name, rule in rules.items() if rule.get("type") == "balance"]
    languages = [f"{name}.code" for name, stage in stages.items() if stage.get("type") == "language"]
    candidates = {
        "concept cluster": clusters,
        "language": [*languages, "language", "meta.language"],
        "source": ["source", "meta.source", "dataset", FOLDER],
    }
    known = {FOLDER, *ledger.columns}
    return [(kind, [name for name in names if name in known]) for kind, names in candidates.items()]


def _grouping(ledger: Ledger, kind: str, column: str, rules: Sequence[str]) -> Grouping | None:
    counted = _counts(ledger, kind, column, rules)
    if len(counted) < 2:
        return None
    groups = [_group(name, ends, len(rules)) for name, ends in counted.items()]
    groups.sort(key=lambda group: (-group.entering[0], group.name))
    whole = Group(
        "all",
        [sum(group.entering[place] for group in groups) for place in range(len(rules))],
        [sum(group.leaving[place] for group in groups) for place in range(len(rules))],
    )
    effective = (_effective([group.entering[0] for group in groups]), _effective([group.kept for group in groups]))
    return Grouping(
        kind, column, rules, whole, groups[:LISTED_GROUPS], len(groups), effective, _warnings(kind, groups, rules)
    )


def _counts(ledger: Ledger, kind: str, column: str, rules: Sequence[str]) -> dict[str, dict[int, int]]:
    """Group -> place of the rule that ended a row (the number of rules for kept ones) -> rows."""
    cases = " ".join(f"WHEN rule = ? THEN {number}" for number in range(len(rules)))
    place = f"CASE {cases} ELSE {len(rules)} END"
    if column == FOLDER:
        named = ledger.rows(
            f"SELECT shard AS name, {place} AS place, count(*) AS rows FROM ledger WHERE verdict <> 'failed' "
            "GROUP BY name, place",
            list(rules),
        )
        folders = {digest: str(said.get("address") or "").rpartition("/")[0] for digest, said in ledger.inputs.items()}
        named = [{**one, "name": folders.get(one["name"]) or "(unknown)"} for one in named]
    else:
        sql = f"CAST({quoted(column)} AS VARCHAR)"
        known = f"{sql} IS NOT NULL" if kind == "concept cluster" else "true"
        named = ledger.rows(
            f"SELECT coalesce({sql}, '(unknown)') AS name, {place} AS place, count(*) AS rows FROM ledger "
            f"WHERE verdict <> 'failed' AND {known} GROUP BY name, place "
            f"ORDER BY sum(count(*)) OVER (PARTITION BY name) DESC, name LIMIT {MOST_GROUPS * (len(rules) + 1)}",
            list(rules),
        )
    found: dict[str, dict[int, int]] = {}
    for one in named:
        ends = found.setdefault(str(one["name"]), {})
        ends[one["place"]] = ends.get(one["place"], 0) + one["rows"]
    return found


def _group(name: str, ends: Mapping[int, int], rules: int) -> Group:
    alive = [sum(rows for place, rows in ends.items() if place >= rule) for rule in range(rules + 1)]
    return Group(name, alive[:-1], alive[1:])


def _warnings(kind: str, groups: Sequence[Group], rules: Sequence[str]) -> list[str]:
    """A sentence for every group that a rule leaves nothing of."""
    found = []
    for group in groups:
        for place, rule in enumerate(rules):
            if group.entering[place] >= WARN_ROWS and not group.leaving[place]:
                found.append(f"{rule} drops all {group.entering[place]:,} rows of {kind} {group.name}.")
    return found


def _effective(sizes: Sequence[int]) -> float:
    total = sum(sizes)
    shares = [size / total for size in sizes if size]
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0


def drawn(one: Grouping, cut: Any) -> dict[str, Any]:
    """What the template shows of a grouping; `cut` shortens names."""

    def line(group: Group) -> dict[str, Any]:
        shares = ["-" if share is None else f"{100 * share:.1f} %" for share in group.shares()]
        low = [
            share is not None and base is not None and share < 0.5 * base
            for share, base in zip(group.shares(), one.whole.shares(), strict=True)
        ]
        total = group.entering[0]
        return {
            "name": cut(group.name),
            "rows": total,
            "cells": list(zip(shares, low, strict=True)),
            "kept": f"{100 * group.kept / total:.1f} %" if total else "-",
        }

    return {
        "kind": one.kind,
        "column": one.column,
        "rules": one.rules,
        "lines": [line(one.whole), *map(line, one.groups)],
        "more": one.count - len(one.groups),
        "effective": [f"{number:,.1f}" for number in one.effective],
        "warnings": [cut(warning) for warning in one.warnings[:LISTED_GROUPS]],
        "more_warnings": max(len(one.warnings) - LISTED_GROUPS, 0),
    }
