"""`sluice lineage show|trace|impact` and `sluice why`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipelines.lineage.questions import Card, Exposure, Lineage, RunInfo
    from pipelines.lineage.samples import Answer, Story

Wanted = Annotated[
    str, typer.Argument(help="A path, a digest or run id (or its first 4 characters or more), or a name.")
]
CatalogUrl = Annotated[
    str | None,
    typer.Option(
        "--catalog", envvar="SLUICE_CATALOG", help="The catalog's URL or file [default: ~/.sluice/catalog.db]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
All = Annotated[bool, typer.Option("--all", help="Draw every raw shard and checkpoint, not the first few.")]

# State by shape and word, not by colour alone.
MARKS = {"passed": "✓", "failed": "✗", "not_measured": "?", "not_reached": "·"}
PLAIN_MARKS = {"passed": "+", "failed": "x", "not_measured": "?", "not_reached": "."}


def register(app: typer.Typer) -> None:
    """Add the commands of this room to the command line."""
    lineage = typer.Typer(no_args_is_help=True, help="What was made from what: runs, snapshots, models, students.")
    lineage.command("show", epilog="Example: `sluice lineage show tiny-student`")(show_command)
    lineage.command("trace", epilog="Example: `sluice lineage trace runs/student/model`")(trace_command)
    lineage.command("impact", epilog="Example: `sluice lineage impact 00003.tar`")(impact_command)
    app.add_typer(lineage, name="lineage")
    app.command("why", epilog="Example: `sluice why 5f2b9c --snapshot out`")(why_command)


def show_command(wanted: Wanted, catalog: CatalogUrl = None, as_json: Json = False) -> None:
    """Show one artifact or run and its nearest neighbours."""
    from pipelines.lineage.catalog import open_catalog
    from pipelines.lineage.questions import show

    card = show(open_catalog(catalog), wanted)
    if as_json:
        _print_json(card.to_json())
    else:
        _print_lines(_card_lines(card))


def trace_command(wanted: Wanted, everything: All = False, catalog: CatalogUrl = None, as_json: Json = False) -> None:
    """Walk back from an artifact to the raw shards it was made from, with digests."""
    from pipelines.lineage.catalog import open_catalog
    from pipelines.lineage.questions import trace

    _print_lineage(trace(open_catalog(catalog), wanted), everything, as_json)


def impact_command(wanted: Wanted, everything: All = False, catalog: CatalogUrl = None, as_json: Json = False) -> None:
    """Walk forward to every snapshot, checkpoint, model and student that was made from an artifact."""
    from pipelines.lineage.catalog import open_catalog
    from pipelines.lineage.questions import impact

    _print_lineage(impact(open_catalog(catalog), wanted), everything, as_json)


def why_command(
    sample: Annotated[
        str, typer.Argument(help="A uid or image id (or its beginning), a picture's file, its URL or key.")
    ],
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", "-s", help="A snapshot or store to look in [default: every one in the catalog]."),
    ] = None,
    catalog: CatalogUrl = None,
    as_json: Json = False,
) -> None:
    """Tell why a sample was kept or dropped, with every score and threshold, and which models learned from it."""
    from pipelines.lineage.catalog import open_catalog
    from pipelines.lineage.samples import why

    answer = why(open_catalog(catalog), sample, snapshot)
    if as_json:
        _print_json(answer.to_json())
    else:
        _print_lines(answer_lines(answer, _unicode_terminal()))


# --- printing ---------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, sort_keys=True, default=str, ensure_ascii=True))


def _print_lines(many: Iterator[str]) -> None:
    for line in many:
        print(line.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"))


def _unicode_terminal() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def _print_lineage(lineage: Lineage, everything: bool, as_json: bool) -> None:
    if as_json:
        _print_json(lineage.to_json())
        return
    from pipelines.lineage.tree import build, lines, rich_tree

    root = build(lineage, everything)
    if sys.stdout.isatty():
        from rich.console import Console

        Console(soft_wrap=True).print(rich_tree(root))
    else:
        _print_lines(lines(root, ascii_only=not _unicode_terminal()))
    print()
    _print_lines(iter([_summary(lineage)]))


def _summary(lineage: Lineage) -> str:
    from collections import Counter

    counts = Counter(one.kind for one in lineage.artifacts.values() if one != lineage.start)
    held = ", ".join(f"{count:,} {kind.replace('_', ' ')}{'' if count == 1 else 's'}" for kind, count in counts.items())
    side = "behind" if lineage.direction == "trace" else "ahead of"
    text = f"{len(lineage.runs)} run{'' if len(lineage.runs) == 1 else 's'} and {held or 'nothing'} lie {side} it."
    unknown = [one for one in lineage.unknown_origin() if one != lineage.start]
    if unknown:
        text += (
            f" {len(unknown)} of them {'has' if len(unknown) == 1 else 'have'} an unknown origin: no recorded run made "
        )
        text += "it." if len(unknown) == 1 else "them."
    return text


def _card_lines(card: Card) -> Iterator[str]:
    import json

    from pipelines.lineage.questions import RunInfo
    from pipelines.lineage.tree import artifact_detail, artifact_head, facts_text, printable, run_detail, when

    subject = card.subject

    def runs_of(title: str, many: Sequence[RunInfo]) -> Iterator[str]:
        for place, run in enumerate(many):
            yield f"  {title if not place else '':<10} {run.kind} run {printable(run.name)}  {run_detail(run)}"

    if isinstance(subject, RunInfo):
        yield f"{subject.kind} run {printable(subject.name)}"
        yield f"  id         {subject.id}"
        yield f"  status     {subject.status}" + (f": {printable(subject.error)}" if subject.error else "")
        yield f"  started    {when(subject.started)} on {printable(subject.host)}"
        yield f"  finished   {when(subject.finished)}"
        yield f"  code       {printable(subject.code_version)}"
        yield f"  config     {subject.config_digest}"
        if subject.seeds:
            yield f"  seeds      {printable(json.dumps(dict(subject.seeds), sort_keys=True))}"
        for attempt in card.tries:
            changed = (
                "" if attempt["config_digest"] == subject.config_digest else f"  config {attempt['config_digest']}"
            )
            yield (
                f"  attempt {attempt['number']:<2} {attempt['status']}  {when(attempt['started'])} to "
                f"{when(attempt['finished'])}  {printable(attempt['host'])}{changed}"
            )
        for title, many in (("read", card.read), ("wrote", card.wrote)):
            for place, one in enumerate(many[:20]):
                yield f"  {title if not place else '':<10} {artifact_head(one)}  {artifact_detail(one)}"
            if len(many) > 20:
                yield f"  {'':<10} and {len(many) - 20} more (--json has all)"
        return
    yield artifact_head(subject)
    yield f"  digest     {printable(subject.digest)}"
    yield f"  address    {printable(subject.address) or '-'}"
    yield f"  seen       {when(subject.first_seen)}"
    if subject.facts:
        yield f"  facts      {facts_text(subject.facts, 100)}"
    yield from runs_of("made by", card.made_by)
    if not card.made_by:
        raw = (
            "raw data: it came from outside"
            if subject.kind == "raw_shard"
            else "no recorded run: its origin is unknown"
        )
        yield f"  made by    {raw}"
    yield from runs_of("used by", card.used_by)
    yield f"\nNext: sluice lineage {'impact' if subject.kind == 'raw_shard' else 'trace'} {subject.digest[:16]}"


def number_text(value: Any, kind: str = "") -> str:
    """A measured value in one short line; unsigned 64-bit values are hashes and are written as imagehash does."""
    from pipelines.lineage.tree import printable

    if kind == "uint64" and isinstance(value, int):
        return f"{value:016x}"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"{value[:16].hex()}... ({len(value)} bytes)"
    if isinstance(value, list | tuple):
        return printable(", ".join(number_text(one) for one in value[:8])) + (" ..." if len(value) > 8 else "")
    text = printable(value)
    return text if len(text) <= 200 else text[:199] + "…"


def answer_lines(answer: Answer, unicode_marks: bool = True) -> Iterator[str]:
    """The answer to `why` as plain lines."""
    from pipelines.lineage.tree import printable

    marks = MARKS if unicode_marks else PLAIN_MARKS
    if len(answer.stories) > 1:
        yield f"{len(answer.stories)} rows fit {printable(answer.question)}:"
        yield ""
    for story in answer.stories:
        yield from _story_lines(story, marks)
        yield ""
    yield from _exposure_lines(answer)
    for one in answer.elsewhere:
        if one.problem:
            yield f"other snapshot {one.snapshot_id[:12]} could not be asked: {printable(one.problem)}"
            continue
        split = " (held out)" if one.split == "held_out" else ""
        rule = f" by {one.rule}" if one.rule and one.verdict != "kept" else ""
        yield f"other snapshot {one.snapshot_id[:12]} at {printable(one.address)}: {one.verdict}{rule}{split}"


def _verdict(story: Story) -> str:
    from pipelines.lineage.tree import printable

    row = story.row
    if row["verdict"] == "kept":
        split = "held out: no training reads it" if row["split"] == "held_out" else f"split {row['split'] or 'train'}"
        return f"KEPT ({split})"
    where = f"rule {row['rule']}" if row["rule"] else f"stage {row['stage']}"
    reason = f": {printable(row['reason'])}" if row["reason"] else ""
    return f"{'DROPPED' if row['verdict'] == 'rejected' else 'FAILED'} by {where}{reason}"


def _story_lines(story: Story, marks: dict[str, str]) -> Iterator[str]:
    from pipelines.lineage.tree import printable

    row = story.row
    yield f"uid {row['uid']}"
    yield f"  {_verdict(story)}"
    yield f"  snapshot   {story.snapshot_id[:12]} at {printable(story.snapshot_address)}"
    address = story.source.get("address")
    yield f"  from       {printable(address) if address else 'a shard whose address is not recorded'}"
    member = f", member {printable(row['member'])}" if row["member"] else ""
    yield f"             row {row['index']}, key {printable(row['key'])}{member}"
    yield f"             shard digest {row['shard']}"
    yield f"  image      {row['image_id']}" + (
        f", {row['size_bytes']:,} bytes" if row["size_bytes"] is not None else ""
    )
    if row["url"]:
        yield f"  url        {printable(row['url'])}"
    if row["source_uid"]:
        yield f"  source id  {printable(row['source_uid'])}"
    for place, caption in enumerate(story.captions):
        score = caption.get("clip_score")
        about = [str(caption["source"])] + ([f"CLIP {score:.4f}"] if score is not None else [])
        yield f"  {'caption' if not place else '':<10} {printable(repr(caption['text'] or ''))} ({', '.join(about)})"
    if story.measurements:
        yield "  measured"
        width = max(len(one.column) for one in story.measurements)
        for one in story.measurements:
            value = one.error if one.value is None and one.error else number_text(one.value, one.type)
            unit = " ".join(part for part in (one.unit, f"({one.scale})" if one.scale else "") if part)
            model = f"model {one.model_digest[:12]}" if one.model_digest else ""
            yield f"    {one.column:<{width}}  {printable('  '.join(part for part in (value, unit, model) if part))}"
    if story.judgements:
        yield "  rules, in the recipe's order"
        width = max(len(one.rule) for one in story.judgements)
        for judged in story.judgements:
            found = f"{judged.column or judged.type} {number_text(judged.value)}" if judged.value is not None else ""
            if judged.state == "not_measured" and isinstance(judged.value, str):
                found = f"{judged.column}: {printable(judged.value)}"
            said = {
                "passed": "passed",
                "failed": "failed",
                "not_measured": "could not be judged",
                "not_reached": "not judged: the row had ended before",
            }[judged.state]
            decided = "  <- this decided" if judged.decided else ""
            parts = [printable(found), f"asked {printable(judged.asked)}" if judged.asked else "", said + decided]
            yield f"    {marks[judged.state]} {judged.rule:<{width}}  {'; '.join(part for part in parts if part)}"
    if story.keeper:
        keeper = story.keeper
        distance = f" at distance {row['distance']:g}" if row["distance"] is not None else ""
        where = (
            f", key {printable(keeper['key'])}, row {keeper['index']}, {keeper['verdict']}" if "key" in keeper else ""
        )
        yield f"  keeper     {keeper['uid']}{distance}{where}"
    if row["output_shard"]:
        yield f"  written to {printable(row['output_shard'])} as {printable(row['output_key'])}"
    for place, other in enumerate(story.same_image):
        rule = f" by {other['rule']}" if other["rule"] and other["verdict"] != "kept" else ""
        title = "same bytes" if not place else ""
        yield f"  {title:<10} uid {other['uid']}, key {printable(other['key'])}: {other['verdict']}{rule}"


def _exposure_lines(answer: Answer) -> Iterator[str]:
    from pipelines.lineage.tree import printable

    def run_line(one: Exposure) -> str:
        made = ", ".join(
            f"{made.kind} {printable(made.name)} {made.digest[:12]}" for made in one.made if made.kind != "checkpoint"
        )
        checkpoints = sum(made.kind == "checkpoint" for made in one.made)
        if checkpoints:
            made += f"{' and ' if made else ''}{checkpoints} checkpoint{'' if checkpoints == 1 else 's'}"
        how = one.grade
        if not one.direct:
            how += f", indirect: its {one.through.kind} {printable(one.through.name)} learned from it"
        run = f"{one.run.kind} run {printable(one.run.name)} ({one.run.status})"
        return f"  {made or 'nothing yet'}  by {run}; grade: {how}"

    if answer.exposures:
        yield "trained on it (member: it was in the snapshot, an upper bound on what was read)"
        yield from (run_line(one) for one in answer.exposures)
    for snapshot in answer.held_out_of:
        yield f"not trained on: held out of snapshot {snapshot[:12]}"
    if not answer.exposures and not answer.held_out_of:
        kept = any(story.row["verdict"] == "kept" for story in answer.stories)
        yield "not trained on: " + (
            "the catalog knows no training run on a snapshot that kept it" if kept else "no snapshot kept it"
        )
    if answer.keeper_exposures:
        yield "its keeper, which looks the same, was trained on:"
        yield from (run_line(one) for one in answer.keeper_exposures)
