"""Was every planted flaw met? The ledger of a curated made-up world against the truth table it was drawn with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.report.telling import auc
from pipelines.snapshot import Snapshot


@dataclass(frozen=True)
class Finding:
    """One line of the audit: `met` of `planted` rows, or a `figure` such as an AUC; `asked` says what was wanted."""

    what: str
    met: int | None = None
    planted: int | None = None
    figure: float | None = None
    asked: str = ""
    holds: bool | None = None

    def __str__(self) -> str:
        shown = f"{self.figure:.4f}" if self.figure is not None else f"{self.met:,} of {self.planted:,}"
        verdict = {True: "holds", False: "FALLS SHORT", None: ""}[self.holds]
        return f"{self.what:44s} {shown:>16s}   {self.asked:28s} {verdict}".rstrip()

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "met": self.met, "planted": self.planted, "figure": self.figure,
                "asked": self.asked, "holds": self.holds}  # fmt: skip


def audit(snapshot: Snapshot, truth_table: Path) -> list[Finding]:
    """Compare every row's verdict with what was planted in it."""
    truth = pq.read_table(truth_table).to_pylist()
    columns = ["key", "uid", "verdict", "rule", "keeper_uid", "clip.score", "aesthetic.score"]
    rows = {row["key"]: row for table in snapshot.tables("ledger", columns) for row in table.to_pylist()}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for planted in truth:
        by_kind.setdefault(planted["kind"], []).append(planted)
    findings = [
        _share("corrupt files failed", (_failed(rows, row) for row in by_kind["corrupt"]), 1.0),
        _share("truncated files failed", (_failed(rows, row) for row in by_kind["truncated"]), 1.0),
        _share("byte duplicates dropped", (_one_dropped(rows, row, "exact") for row in by_kind["byte_duplicate"]), 1.0),
    ]
    near = by_kind["near_duplicate"]
    findings.append(_share("near-duplicates dropped", (_one_dropped(rows, row, "near") for row in near), 0.95))
    for edit in sorted({row["edit"] for row in near}):
        mine = [_one_dropped(rows, row, "near") for row in near if row["edit"] == edit]
        findings.append(_share(f"  of those {edit}", mine, None))
    mistaken = _distinct_dropped(rows, truth)
    findings.append(Finding("distinct scenes dropped as duplicates", mistaken, len(truth), None, "none", mistaken == 0))
    for kind, rule in (("too_small", "short_side"), ("boilerplate", "caption")):
        findings.append(_share(f"{kind} rejected", (_by_rule(rows, row, rule) for row in by_kind[kind]), 1.0))
    findings += _rankings(rows, by_kind)
    funnel = snapshot.manifest["funnel"]
    accounted = funnel["kept"] + funnel["rejected"] + funnel["failed"]
    findings.append(
        Finding("rows accounted for in the funnel", accounted, len(truth), None, "all", accounted == len(truth))
    )
    return findings


def _rankings(rows: Mapping[str, Any], by_kind: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """How far the models rank flawed rows below sound ones (AUC: the chance that a sound row scores higher)."""
    true_scores = _scores(rows, by_kind["clean"], "clip.score")
    findings = []
    for kind, asked in (("swapped_caption", 0.95), ("swapped_attributes", None), ("swapped_relation", None)):
        figure = auc(true_scores, _scores(rows, by_kind[kind], "clip.score"))
        wanted = f"at least {asked}" if asked else "shown as it is"
        findings.append(
            Finding(f"AUC of CLIP, true over {kind}", None, None, figure, wanted, figure >= asked if asked else None)
        )
    figure = auc(_scores(rows, by_kind["clean"], "aesthetic.score"), _scores(rows, by_kind["ugly"], "aesthetic.score"))
    findings.append(Finding("AUC of aesthetic score, clean over ugly", None, None, figure, "shown as it is"))
    for kind in ("swapped_caption", "ugly"):
        measured = [row for row in by_kind[kind] if rows[row["key"]]["clip.score"] is not None]
        findings.append(_share(f"{kind} rejected", (rows[row["key"]]["verdict"] != "kept" for row in measured), None))
    return findings


def _scores(rows: Mapping[str, Any], planted: Iterable[Mapping[str, Any]], column: str) -> list[float]:
    values = (rows[row["key"]][column] for row in planted)
    return [value for value in values if value is not None]


def _share(what: str, met: Iterable[bool], asked: float | None) -> Finding:
    flags = list(met)
    wanted = "" if asked is None else "all" if asked == 1 else f"at least {asked:.0%}"
    holds = None if asked is None else sum(flags) >= asked * len(flags)
    return Finding(what, sum(flags), len(flags), None, wanted, holds)


def _failed(rows: Mapping[str, Any], planted: Mapping[str, Any]) -> bool:
    return rows[planted["key"]]["verdict"] == "failed"


def _by_rule(rows: Mapping[str, Any], planted: Mapping[str, Any], rule: str) -> bool:
    return rows[planted["key"]]["rule"] == rule


def _one_dropped(rows: Mapping[str, Any], planted: Mapping[str, Any], rule: str) -> bool:
    """Of a copy and its original, one was dropped by the rule (which one is the keeper order's affair)."""
    pair = (rows[planted["key"]], rows[planted["original_key"]])
    return any(row["rule"] == rule for row in pair)


def _distinct_dropped(rows: Mapping[str, Any], truth: Sequence[Mapping[str, Any]]) -> int:
    """Rows dropped for a keeper that shows another scene."""
    scene_of = {row["key"]: row["scene_id"] for row in truth}
    scene_of_uid = {row["uid"]: scene_of[key] for key, row in rows.items()}
    dropped = [(key, row) for key, row in rows.items() if row["keeper_uid"]]
    return sum(scene_of[key] != scene_of_uid[row["keeper_uid"]] for key, row in dropped)
