"""Self-contained HTML pages: one for a snapshot, one for a training run, one that tells a whole story.

    html = snapshot_page("out/snapshots/3fa1", images)   # images(shard digest, key, member, index) -> bytes or None
    html = run_page("runs/student", lineage=build(trace(catalog, "runs/student")))
    html = combined_page("Sluice demo", snapshot="out", runs=["runs/teacher", "runs/student"])

A page fetches nothing and runs nothing: pictures are small data URIs, plots inline SVG, there is no script, and a
content security policy says so to the browser. Captions, keys and names are other people's text: every one is escaped.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipelines.lineage.ledger import VERDICTS, Ledger, open_ledger
from pipelines.lineage.record import code_version
from pipelines.lineage.tree import Node, duration, printable
from pipelines.report import facts, groups, plots, telling
from pipelines.report.pictures import Images, SnapshotImages, Thumbnail, row_thumbnail
from pipelines.report.runs import (
    Grid,
    Table,
    evaluation_table,
    loss_lines,
    read_grid,
    read_losses,
    read_run,
)

SHOTS = 8
PAIRS = 6
CAPTION_SAMPLES = 10
LISTED = 200
LONGEST_TEXT = 600


@dataclass(frozen=True)
class Head:
    """The top of a page or part. meta: (label, value, monospaced?). tiles: (number, label, class)."""

    kind: str
    title: str
    about: str = ""
    meta: Sequence[tuple[str, str, bool]] = ()
    tiles: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Shot:
    """One picture with the words under it."""

    picture: Thumbnail
    words: str
    verdict: str
    value: str
    caption: str
    reason: str
    key: str
    uid: str
    distance: str = ""
    distance_unit: str = ""
    keeper: Shot | None = None


@dataclass(frozen=True)
class FunnelLine:
    name: str
    kind: str
    asked: str
    entering: int
    ended: int
    leaving: int
    bar: Markup


@dataclass
class SnapshotBody:
    """What snapshot.html.j2 draws."""

    head: Head
    funnel: facts.Funnel
    funnel_lines: Sequence[FunnelLine]
    distributions: Sequence[Mapping[str, Any]]
    rules: Sequence[Mapping[str, Any]]
    groupings: Sequence[Mapping[str, Any]]
    telling: Sequence[telling.Telling]
    failures: Sequence[Mapping[str, Any]]
    failure_kinds: int
    captions: Sequence[Mapping[str, Any]]
    split_words: str
    split_bar: Markup
    split_legend: Sequence[tuple[str, int, str]]
    split_problem: str
    lineage: Sequence[tuple[int, Node]]
    recipe: str
    models: str
    provenance: str
    inputs: Sequence[Mapping[str, Any]]
    inputs_count: int
    shards: Sequence[Mapping[str, Any]]
    shards_count: int
    prefix: str = ""
    part: bool = False
    template: str = "snapshot.html.j2"

    @property
    def sections(self) -> list[tuple[str, str]]:
        names = [("funnel", "Funnel"), ("measured", "Measured"), ("rules", "Examples"), ("groups", "Groups")]
        names.append(("telling", "CLIP"))
        names.append(("failures", "Failures"))
        names += [("captions", "Captions"), ("split", "Held out"), ("lineage", "Lineage"), ("provenance", "Provenance")]
        absent = {"measured": not self.distributions, "captions": not self.captions, "lineage": not self.lineage}
        absent["groups"] = not self.groupings
        absent["telling"] = not self.telling
        return [(self.prefix + anchor, name) for anchor, name in names if not absent.get(anchor)]


@dataclass
class RunBody:
    """What run.html.j2 draws."""

    head: Head
    loss_words: str
    loss_wide: Markup | None
    loss_narrow: Markup | None
    loss_legend: Sequence[tuple[str, Markup]]
    grid: Grid | None
    evaluation: Table | None
    lineage: Sequence[tuple[int, Node]]
    recipe: str
    model: str
    run: str
    prefix: str = ""
    part: bool = False
    template: str = "run.html.j2"

    @property
    def sections(self) -> list[tuple[str, str]]:
        names = [("drawn", "Drawings"), ("evaluation", "Evaluation"), ("loss", "Loss"), ("lineage", "Lineage")]
        names.append(("config", "Configuration"))
        absent = {"drawn": self.grid is None, "evaluation": self.evaluation is None, "lineage": not self.lineage}
        return [(self.prefix + anchor, name) for anchor, name in names if not absent.get(anchor)]


@dataclass
class TablesBody:
    """What tables.html.j2 draws: plain tables and a lineage tree of their own."""

    tables: Sequence[Table]
    lineage: Sequence[tuple[int, Node]]
    head: Head | None = None
    prefix: str = ""
    part: bool = False
    template: str = "tables.html.j2"

    @property
    def sections(self) -> list[tuple[str, str]]:
        named = [(f"{self.prefix}table{place}", table.title) for place, table in enumerate(self.tables, 1)]
        return named + ([(f"{self.prefix}tree", "Lineage")] if self.lineage else [])


@dataclass
class SamplesBody:
    groups: Sequence[Mapping[str, Any]]
    head: Head | None = None
    prefix: str = ""
    part: bool = False
    template: str = "samples.html.j2"
    sections: list[tuple[str, str]] = field(default_factory=list)


# --- the pages --------------------------------------------------------------------------------------------------------


def snapshot_page(snapshot: str | Path, images: Images | None = None, *, lineage: Node | None = None) -> str:
    """The page of a snapshot (its folder, or a store's latest). images: by default found where the manifest says.

    Memory is bounded by what the page shows, not by the ledger. Raises ValueError where there is no snapshot.
    """
    with open_ledger(snapshot) as ledger:
        body = _snapshot_body(ledger, images or SnapshotImages(ledger), lineage)
    return _render(body.head, [body])


def run_page(run: str | Path, *, lineage: Node | None = None) -> str:
    """The page of a training or distillation run. Raises ValueError where there is no run.json."""
    body = _run_body(run, lineage)
    return _render(body.head, [body])


def combined_page(
    title: str,
    *,
    snapshot: str | Path | None = None,
    images: Images | None = None,
    runs: Sequence[str | Path] = (),
    tables: Sequence[Table] = (),
    lineage: Node | None = None,
    about: str = "",
    tiles: Sequence[tuple[str, str]] = (),
) -> str:
    """One page for a whole story: tables and the lineage tree first, then the runs (the last one first), then the data.

    tiles: (number, label) shown at the top.
    """
    bodies: list[Any] = []
    sections: list[tuple[str, str]] = []
    if tables or lineage:
        bodies.append(TablesBody(tables, _flatten(lineage), prefix="all-"))
        sections += bodies[-1].sections
    for number, run in enumerate(reversed(list(runs)), 1):
        body = _run_body(run, None)
        body.prefix, body.part = f"run{number}-", True
        bodies.append(body)
        sections.append((f"run{number}-top", body.head.title))
    if snapshot is not None:
        with open_ledger(snapshot) as ledger:
            data = _snapshot_body(ledger, images or SnapshotImages(ledger), None)
        data.prefix, data.part = "data-", True
        bodies.append(data)
        sections.append(("data-top", "The data"))
    head = Head("Report", title, about, (), [(number, label, "") for number, label in tiles])
    return _render(head, bodies, sections)


def samples_page(
    snapshot: str | Path,
    images: Images | None = None,
    *,
    verdict: str | None = None,
    reason: str | None = None,
    limit: int = 24,
) -> str:
    """Samples with pictures, grouped by verdict and rule; `verdict` and `reason` (a rule, or words in one) select."""
    with open_ledger(snapshot) as ledger:
        groups, total = sample_groups(ledger, verdict, reason, limit)
        drawn = _Drawer(ledger, images or SnapshotImages(ledger))
        shown = []
        for group in groups:
            shots = [drawn.shot(one) for one in group.examples]
            paired = any(shot.keeper for shot in shots)
            shown.append(
                {
                    "title": group.title,
                    "verdict": group.verdict,
                    "words": f"{group.rows:,} rows, {len(shots):,} of them shown.",
                    "shots": shots,
                    "pairs": shots if paired else [],
                }
            )
        asked = ", ".join(part for part in (verdict, f"reason {reason!r}" if reason else "") if part) or "every verdict"
        head = Head(
            "Samples",
            f"Samples of snapshot {ledger.id[:12]}",
            f"{total:,} rows: {asked}.",
            [("Snapshot", ledger.id, True), ("Address", ledger.address, True)],
        )
    body = SamplesBody(shown)
    body.sections = [(f"group{place}", group.title) for place, group in enumerate(groups, 1)]
    return _render(head, [body])


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Rows with one verdict and one cause."""

    verdict: str
    cause: str | None
    rows: int
    examples: Sequence[facts.Example]

    @property
    def title(self) -> str:
        if self.verdict == "kept":
            return "kept"
        return f"{'dropped' if self.verdict == 'rejected' else 'failed'} by {self.cause or '?'}"


def sample_groups(ledger: Ledger, verdict: str | None, reason: str | None, limit: int) -> tuple[list[Group], int]:
    """Up to `limit` rows of every (verdict, cause) that fits, and how many fit. Raises ValueError where none does."""
    if verdict is not None and verdict not in VERDICTS:
        raise ValueError(f"--verdict {verdict!r} is none of {', '.join(VERDICTS)}")
    conditions, values = ["true"], []
    if verdict:
        conditions.append("verdict = ?")
        values.append(verdict)
    if reason:
        conditions.append("(rule = ? OR stage = ? OR contains(lower(coalesce(reason, '')), lower(?)))")
        values += [reason, reason, reason]
    chosen = " AND ".join(conditions)
    cause = "CASE WHEN verdict = 'kept' THEN NULL ELSE coalesce(rule, stage) END"
    counted = ledger.rows(
        f"SELECT verdict, {cause} AS cause, count(*) AS rows FROM ledger WHERE {chosen} GROUP BY verdict, cause", values
    )
    if not counted:
        causes = ledger.rows(f"SELECT DISTINCT {cause} AS cause FROM ledger WHERE verdict <> 'kept' ORDER BY cause")
        listed = ", ".join(str(one["cause"]) for one in causes) or "nothing was dropped"
        raise ValueError(f"no row of snapshot {ledger.id[:12]} fits; causes in it: {listed}")
    place = {step["rule"]: number for number, step in enumerate(ledger.steps)}
    counted.sort(key=lambda one: (VERDICTS.index(one["verdict"]), place.get(one["cause"], -1), str(one["cause"])))
    groups = []
    for one in counted:
        found = facts.examples(
            ledger,
            f"{chosen} AND verdict = ? AND {cause} IS NOT DISTINCT FROM ?",
            [*values, one["verdict"], one["cause"]],
            limit,
        )
        for example in found:
            example.shown = example.row["value"]
        facts.add_keepers(ledger, found)
        groups.append(Group(one["verdict"], one["cause"], one["rows"], found))
    return groups, sum(one["rows"] for one in counted)


class _Drawer:
    """Turns examples into shots, looking at each picture once."""

    def __init__(self, ledger: Ledger, images: Images) -> None:
        self.ledger = ledger
        self.images = images
        self.seen: dict[tuple[str, int], Thumbnail] = {}
        self.exact = {step["rule"] for step in ledger.steps if step.get("type") == "exact_duplicates"}

    def thumbnail(self, row: Mapping[str, Any]) -> Thumbnail:
        place = (row["shard"], row["index"])
        if row.get("withheld"):
            return Thumbnail(problem="withheld")
        if place not in self.seen:
            self.seen[place] = row_thumbnail(self.images, row)
        return self.seen[place]

    def shot(self, one: facts.Example) -> Shot:
        row = one.row
        distance = row.get("distance")
        duplicate = bool(row.get("keeper_uid"))
        value = "" if duplicate else _number(one.shown)
        caption = _cut(one.caption)
        near = duplicate and distance is not None
        return Shot(
            picture=self.thumbnail(row),
            words=caption or f"sample {_cut(row['key'])}",
            verdict=row["verdict"],
            value=value,
            caption=caption,
            reason=_cut(row.get("reason")),
            key=_cut(row["key"]),
            uid=row["uid"],
            distance=("same" if row["rule"] in self.exact else f"{distance:g}") if near else "",
            distance_unit=("bytes" if row["rule"] in self.exact else "bit" if distance == 1 else "bits")
            if near
            else "",
            keeper=self.shot(one.keeper) if one.keeper else None,
        )


def _cut(text: Any) -> str:
    clean = printable("" if text is None else text)
    return clean if len(clean) <= LONGEST_TEXT else clean[: LONGEST_TEXT - 1] + "…"


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:,.4g}" if not math.isfinite(value) or abs(value) < 1e5 else f"{value:,.0f}"
    return _cut(value)


# --- a snapshot -------------------------------------------------------------------------------------------------------


def _snapshot_body(ledger: Ledger, images: Images, lineage: Node | None) -> SnapshotBody:
    manifest, provenance = ledger.manifest, ledger.provenance
    funnel = facts.funnel(ledger)
    drawer = _Drawer(ledger, images)
    rules, distributions = [], []
    for step in funnel.steps:
        paired = step.type.endswith("_duplicates")
        found = facts.rule_facts(ledger, step, PAIRS if paired else SHOTS)
        shots = [drawer.shot(one) for one in found.dropped]
        rules.append(
            {
                "name": step.name,
                "asked": step.asked,
                "dropped_count": step.dropped,
                "dropped": shots,
                "causes": [
                    (_cut(cause.reason), cause.rows, [drawer.shot(one) for one in cause.examples])
                    for cause in found.causes
                ],
                "pairs": shots if paired else [],
                "kept": [drawer.shot(one) for one in found.kept],
                "kept_how": found.kept_how,
            }
        )
        if found.distribution:
            distributions.append(_distribution(step, found.distribution))
    failures, kinds = facts.failures(ledger)
    split_words, split_bar, split_legend, split_problem = _split(ledger)
    shards = manifest.get("shards", ())
    inputs = list(ledger.inputs.values())
    return SnapshotBody(
        head=_snapshot_head(ledger, funnel),
        funnel=funnel,
        funnel_lines=_funnel_lines(funnel),
        distributions=distributions,
        rules=rules,
        telling=telling.telling_apart(ledger),
        groupings=[groups.drawn(one, _cut) for one in groups.groupings(ledger)],
        failures=[
            {**one, "reason": _cut(one["reason"]), "keys": [_cut(key) for key in one["keys"] or ()]} for one in failures
        ],
        failure_kinds=kinds,
        captions=_captions(ledger, drawer),
        split_words=split_words,
        split_bar=split_bar,
        split_legend=split_legend,
        split_problem=split_problem,
        lineage=_flatten(lineage),
        recipe=_yaml(manifest.get("recipe", {})),
        models=_yaml({"models": manifest.get("models", {}), "numerics": manifest.get("numerics", {})}),
        provenance=_yaml({name: value for name, value in provenance.items() if name not in ("inputs", "units")}),
        inputs=[
            {
                "address": one.get("address", ""),
                "digest": str(one["digest"]),
                "rows": one.get("rows", 0),
                "kept": one.get("kept", 0),
            }
            for one in inputs[:LISTED]
        ],
        inputs_count=len(inputs),
        shards=[
            {"held_out": 0, "size_bytes": 0, "count": 0, **one, "digest": str(one.get("digest", ""))}
            for one in shards[:LISTED]
        ],
        shards_count=len(shards),
    )


def _snapshot_head(ledger: Ledger, funnel: facts.Funnel) -> Head:
    manifest, provenance = ledger.manifest, ledger.provenance
    duplicates = sum(step.dropped for step in funnel.steps if step.type.endswith("_duplicates"))
    share = f"{100 * funnel.kept / funnel.rows_in:.1f} %" if funnel.rows_in else "-"
    size = sum(one.get("size_bytes", 0) for one in manifest.get("shards", ()))
    parents = manifest.get("parents") or []
    meta = [
        ("Snapshot id", ledger.id, True),
        ("Address", ledger.address, True),
        ("Made", _made(provenance), False),
        ("Code", str(manifest.get("code_version") or "-"), True),
    ]
    if parents:
        meta.insert(1, ("Parents", ", ".join(str(one)[:12] for one in parents), True))
    inputs = len(ledger.inputs)
    about = f"{funnel.rows_in:,} rows from {inputs:,} raw {'shard' if inputs == 1 else 'shards'}, "
    about += f"judged by {len(funnel.steps)} rules."
    tiles = [
        (f"{funnel.rows_in:,}", "rows in", ""),
        (f"{funnel.kept:,}", f"kept, {share}", "kept"),
        (f"{funnel.rejected:,}", f"dropped, {duplicates:,} as duplicates", ""),
        (f"{funnel.failed:,}", "failed", "failed" if funnel.failed else ""),
        (f"{manifest.get('held_out', {}).get('rows', 0):,}", "held out from training", ""),
        (_bytes(size), f"in {len(manifest.get('shards', ())):,} shards", ""),
    ]
    return Head("Snapshot", f"Snapshot {ledger.id[:12]}", about, meta, tiles)


def _made(provenance: Mapping[str, Any]) -> str:
    try:
        started = datetime.fromisoformat(str(provenance["started"]))
        finished = datetime.fromisoformat(str(provenance["finished"]))
    except (KeyError, ValueError):
        return "-"
    host = f" on {provenance['host']}" if provenance.get("host") else ""
    return f"{started:%Y-%m-%d %H:%M}, in {duration((finished - started).total_seconds())}{host}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _funnel_lines(funnel: facts.Funnel) -> list[FunnelLine]:
    lines = []

    def add(name: str, kind: str, asked: str, entering: int, dropped: int, failed: int) -> None:
        leaving = entering - dropped - failed
        bar = plots.funnel_bar(funnel.rows_in, entering, leaving, failed)
        lines.append(FunnelLine(name, kind, asked, entering, dropped + failed, leaving, bar))

    alive = funnel.rows_in
    for place, step in enumerate(funnel.steps):
        if step.failed_before or (place == 0 and funnel.failed):
            asked = "rows that do not open or cannot be measured"
            add("readable" if place == 0 else "measurable", "failed", asked, alive, 0, step.failed_before)
        also = f" ({step.failed:,} could not be judged)" if step.failed else ""
        add(step.name, "rule", step.asked + also, step.entering, step.dropped, step.failed)
        alive = step.leaving
    if alive > funnel.kept:
        add("measurable", "failed", "rows that cannot be measured", alive, 0, alive - funnel.kept)
    return lines


def _distribution(step: facts.Step, one: facts.Distribution) -> dict[str, Any]:
    notes = []
    if one.clipped:
        notes.append(f"{one.clipped:,} rows beyond the ends are counted in the outermost bars.")
    if one.missing:
        notes.append(f"{one.missing:,} rows have no value.")
    drawn: dict[str, Any] = {"rule": step.name, "asked": step.asked, "note": " ".join(notes), "plot": None, "words": []}
    if one.bins:
        drawn["plot"] = plots.histogram(one.bins, one.cuts, one.label)
    else:
        most = max(kept + ended for _, kept, ended in one.categories)
        drawn["words"] = [
            (_cut(word), plots.funnel_bar(most, kept + ended, kept), kept, ended)
            for word, kept, ended in one.categories
        ]
    return drawn


def _captions(ledger: Ledger, drawer: _Drawer) -> list[dict[str, Any]]:
    many = facts.examples(ledger, "verdict = 'kept'", [], CAPTION_SAMPLES, "captions")
    texts = facts.caption_rows(ledger, many)
    lines = []
    for one in many:
        for place, caption in enumerate(texts.get(one.row["uid"], ())[:5]):
            model = f" ({caption['model']})" if caption.get("model") else ""
            score, tokens = caption.get("clip_score"), caption.get("token_count")
            lines.append(
                {
                    "picture": drawer.thumbnail(one.row) if place == 0 else None,
                    "text": _cut(caption["text"]),
                    "source": f"{caption['source']}{model}",
                    "tokens": "" if tokens is None else f"{tokens:,}",
                    "score": "" if score is None else f"{score:.3f}",
                }
            )
    return lines


def _split(ledger: Ledger) -> tuple[str, Markup, list[tuple[str, int, str]], str]:
    said, counted = ledger.manifest.get("held_out", {}), facts.splits(ledger)
    held_out, train = counted.get("held_out", 0), sum(rows for name, rows in counted.items() if name != "held_out")
    total = held_out + train
    words = "No row is held out."
    if held_out:
        words = (
            f"{held_out:,} of {total:,} kept rows ({100 * held_out / total:.1f} %) in {said.get('groups', 0):,} "
            f"duplicate groups are held out; {said.get('fraction', 0) * 100:g} % were asked for. Training refuses them."
        )
        if said.get("inherited"):
            words += f" {said['inherited']:,} groups kept the side they had in a parent snapshot."
    wrong = "rows" in said and said["rows"] != held_out
    problem = f"The manifest says {said['rows']:,} rows are held out; the ledger holds {held_out:,}." if wrong else ""
    bar = plots.bar([("f-keep", 100 * train / max(total, 1)), ("f-held", 100 * held_out / max(total, 1))])
    legend = [
        ("train", train, "f-keep"),
        ("held out", held_out, "f-held"),
    ]
    return words, bar, legend, problem


# --- a run ------------------------------------------------------------------------------------------------------------


def _run_body(run: str | Path, lineage: Node | None) -> RunBody:
    folder, said, model = read_run(run)
    losses = read_losses(folder)
    lines = loss_lines(losses)
    grid = read_grid(folder)
    evaluation = evaluation_table(folder.read_json("evaluation.json")) if folder.is_file("evaluation.json") else None
    distilled = said.get("kind") == "distill"
    final = {split: losses.final(split) for split in ("train", "held_out")}
    last = losses.last
    tiles = []
    if last:
        tiles.append((f"{int(last['step']):,}", "training steps", ""))
    for split, label in (("train", "train loss at the end"), ("held_out", "held-out loss at the end")):
        if final[split] is not None:
            tiles.append((f"{final[split]:.4g}", label, ""))
    if last.get("samples_seen"):
        tiles.append((f"{int(last['samples_seen']):,}", "samples seen", ""))
    if last.get("seconds"):
        tiles.append((duration(float(last["seconds"])), "of training", ""))
    if model.get("steps"):
        tiles.append((str(model["steps"]), "steps to draw a picture", "kept"))
    words = "Training loss; this run measured no held-out loss." if losses.steps else "This run logged no loss."
    if final["held_out"] is not None:
        words = "The held-out loss is measured on rows of the snapshot that training refuses."
    if losses.not_finite:
        words += f" {losses.not_finite:,} logged losses were not finite and are left out."
    name = said.get("name") or folder.url.rpartition("/")[2]
    meta = [("Run id", str(said.get("id", "-")), True), ("Folder", folder.url, True)]
    if isinstance(said.get("started"), int | float):
        began = datetime.fromtimestamp(said["started"], UTC)
        ended = said.get("finished")
        spent = f", in {duration(ended - said['started'])}" if isinstance(ended, int | float) else ", not finished"
        meta.append(("Started", f"{began:%Y-%m-%d %H:%M} UTC{spent}", False))
    for label, key in (("Snapshot", "snapshot"), ("Teacher", "teacher")):
        found = said.get(key)
        if isinstance(found, Mapping):
            meta.append((label, str(found.get("id") or found.get("digest") or "-")[:16], True))
        elif found:
            meta.append((label, str(found)[:64], True))
    if model.get("method"):
        meta.append(("Method", str(model["method"]).replace("_", " "), False))
    kind = "Distillation" if distilled else "Training"
    return RunBody(
        head=Head(kind + " run", f"{kind} run {name}", "", meta, tiles),
        loss_words=words,
        loss_wide=plots.curves(lines, "step", "loss") if lines else None,
        loss_narrow=plots.curves(lines, "step", "loss", 380, 250) if lines else None,
        loss_legend=[
            (
                line.name,
                Markup('<svg viewBox="0 0 26 13"><path d="M0 6.5H26" class="p-line p-{}"/></svg>').format(line.style),
            )
            for line in lines
        ],
        grid=grid,
        evaluation=evaluation,
        lineage=_flatten(lineage),
        recipe=_yaml(said.get("recipe", {})),
        model=_yaml(model) if model else "",
        run=_yaml({key: value for key, value in said.items() if key != "recipe"}),
    )


# --- rendering --------------------------------------------------------------------------------------------------------


def _flatten(root: Node | None) -> list[tuple[int, Node]]:
    """(depth, node) of a tree in drawing order, however deep it is."""
    if root is None:
        return []
    found, stack = [], [(0, root)]
    while stack:
        depth, node = stack.pop()
        found.append((depth, node))
        stack += [(depth + 1, child) for child in reversed(node.children)]
    return found


def _yaml(value: Any) -> str:
    import json

    import yaml

    plain = json.loads(json.dumps(value, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip() if plain else "none"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return _cut(value)


def _numeric(value: Any) -> bool:
    """Whether a table cell stands on the right: numbers, and texts such as "97.5 %"."""
    if isinstance(value, bool) or value is None:
        return False
    return isinstance(value, int | float) or bool(re.fullmatch(r"[-+−]?[\d.,]+ ?(%|s|x|×)?", str(value)))


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["cell"] = _cell
    environment.filters["numeric"] = _numeric
    environment.filters["seconds"] = lambda value: f"{value:.3g} s"
    return environment


def _render(head: Head, bodies: Sequence[Any], sections: Sequence[tuple[str, str]] | None = None) -> str:
    listed = list(sections) if sections is not None else [one for body in bodies for one in body.sections]
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            head=head,
            page_title=f"{head.title} · Sluice",
            bodies=bodies,
            sections=listed,
            patterns=plots.PATTERNS,
            version=code_version(),
            foot=f"Written by Sluice {code_version()}. This file is complete: it fetches nothing and runs no script.",
        )
    )
    # A lone surrogate in somebody's caption cannot be written as UTF-8.
    return html.encode("utf-8", "replace").decode("utf-8")
