"""`sluice report` and `sluice show`: pages of a snapshot or a run, and its samples with their pictures."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipelines.lineage.catalog import Catalog
    from pipelines.lineage.record import Artifact
    from pipelines.lineage.tree import Node

CatalogUrl = Annotated[
    str | None,
    typer.Option(
        "--catalog", envvar="SLUICE_CATALOG", help="The catalog's URL or file [default: ~/.sluice/catalog.db]."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this room to the command line."""
    app.command("report", epilog="Example: `sluice report runs/student --output student.html`")(report_command)
    app.command("show", epilog="Example: `sluice show out --reason near`")(show_command)


def report_command(
    subject: Annotated[
        str, typer.Argument(metavar="SNAPSHOT|RUN", help="A store, or the folder of a snapshot, run or evaluation.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where to write the page [default: report.html inside it].")
    ] = None,
    catalog: CatalogUrl = None,
) -> None:
    """Write one self-contained HTML page about a snapshot or a training run."""
    from cluster.storage import Folder
    from pipelines.lineage.catalog import open_catalog
    from pipelines.lineage.ledger import open_ledger
    from pipelines.lineage.record import Artifact, record_run
    from pipelines.report.evaluations import evaluation_page, is_evaluation, read_evaluation
    from pipelines.report.pages import run_page, snapshot_page
    from stages.contract import digest_of

    books = open_catalog(catalog)
    folder = Folder(subject)
    about: Artifact | None
    if is_evaluation(folder):
        _, result = read_evaluation(subject)
        html, about = evaluation_page(subject), Artifact("evaluation", digest_of(result), folder.url)
    elif folder.is_file("run.json") and not folder.is_file("manifest.json"):
        html, about = run_page(subject, lineage=lineage_of(books, subject)), _model_of(folder)
    else:
        with open_ledger(subject) as ledger:
            folder, about = ledger.folder, Artifact("snapshot", ledger.id, ledger.address)
        html = snapshot_page(folder.url, lineage=lineage_of(books, about.digest))
    place = _write(html, output, folder)
    # A page holds pictures: whoever has to withdraw one must be able to find the page.
    with record_run(books, kind="report", name=folder.url.rpartition("/")[2], config={"subject": folder.url}) as run:
        if about:
            run.consume(about)
        run.produce(Artifact("report", _digest(html), place, "report.html", {"size_bytes": len(html.encode())}))
    print(f"wrote {place} ({len(html.encode()) / 1e6:.1f} MB)")
    print("Next: open it in a browser" + (f", or sluice lineage trace {about.digest[:16]}" if about else ""))


def show_command(
    snapshot: Annotated[str, typer.Argument(help="A store or a snapshot's folder.")],
    reason: Annotated[
        str | None,
        typer.Option("--reason", help="Only rows ended by this rule or stage, or whose reason holds this text."),
    ] = None,
    verdict: Annotated[str | None, typer.Option("--verdict", help="Only kept, rejected or failed rows.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=500, help="Samples shown of each verdict and cause.")
    ] = 24,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where to write the page [default: samples-ID.html here].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON and write no page.")] = False,
) -> None:
    """Show samples by verdict and reason: a table here, and a self-contained page with their pictures."""
    import json

    from pipelines.lineage.ledger import open_ledger
    from pipelines.report.pages import sample_groups, samples_page

    with open_ledger(snapshot) as ledger:
        groups, total = sample_groups(ledger, verdict, reason, limit)
        name, address = f"samples-{ledger.id[:12]}.html", ledger.address
    if as_json:
        rows = [
            {
                "verdict": group.verdict,
                "cause": group.cause,
                "rows": group.rows,
                "samples": [_row(e) for e in group.examples],
            }
            for group in groups
        ]
        print(json.dumps({"rows": total, "groups": rows}, indent=1, ensure_ascii=True, default=str))
        return
    _print_table(groups)
    place = _write(samples_page(address, verdict=verdict, reason=reason, limit=limit), output or name, None)
    print(f"\n{total:,} rows fit. Wrote {place} with their pictures.")
    first = next(example for group in groups for example in group.examples)
    print(f"Next: sluice why {first.row['uid'][:16]} --snapshot {snapshot}")


def lineage_of(catalog: Catalog, subject: str) -> Node | None:
    """The lineage tree behind a snapshot or run, or None where the catalog does not know it."""
    from pipelines.lineage.questions import trace
    from pipelines.lineage.tree import build

    try:
        return build(trace(catalog, subject))
    except ValueError:
        return None


def _model_of(folder: Any) -> Artifact | None:
    """The model that came of a run, once it has one."""
    from pipelines.lineage.record import Artifact

    model = folder.read_json("model/model.json") if folder.is_file("model/model.json") else {}
    kind = "student" if model.get("kind") == "student" else "model"
    return Artifact(kind, str(model["digest"])) if model.get("digest") else None


def _write(html: str, output: str | None, folder: Any) -> str:
    from cluster.storage import Folder, absolute

    if output is None:
        folder.write("report.html", html)
        return str(folder.address("report.html"))
    parent, _, name = absolute(output).rpartition("/")
    Folder(parent).write(name, html)
    return f"{parent}/{name}"


def _digest(html: str) -> str:
    import hashlib

    return hashlib.sha256(html.encode()).hexdigest()


def _row(example: Any) -> dict[str, Any]:
    row = {name: value for name, value in example.row.items() if value is not None}
    return {**row, "caption": example.caption}


def _print_table(groups: Any) -> None:
    from pipelines.lineage.commands import number_text
    from pipelines.lineage.tree import printable

    header = ("verdict", "cause", "uid", "value", "reason or caption", "key")
    marks = {"kept": "+ kept", "rejected": "x dropped", "failed": "! failed"}
    lines = []
    for group in groups:
        for example in group.examples[:8]:
            row = example.row
            words = row["reason"] if row["verdict"] != "kept" else example.caption
            value = number_text(row["value"]) if row["value"] is not None else "-"
            cause = printable(group.cause or "-")
            text = printable(words or "-")
            lines.append(
                (marks[group.verdict], cause, row["uid"][:16], value, text[:60], printable(row["key"] or "-")[:40])
            )
        if group.rows > 8:
            lines.append(("", printable(group.cause or "-"), f"... {group.rows:,} in all", "", "", ""))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header, box=None, header_style="dim", pad_edge=False)
        for line in lines:
            table.add_row(*(Text(cell, overflow="ellipsis", no_wrap=place != 4) for place, cell in enumerate(line)))
        Console().print(table)
        return
    encoding = sys.stdout.encoding or "utf-8"
    widths = [max(len(line[place]) for line in [header, *lines]) for place in range(len(header))]
    for line in [header, *lines]:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(text.encode(encoding, "backslashreplace").decode(encoding))
