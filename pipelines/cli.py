"""The `sluice` command. Importing this costs little: torch, ray and the rest are imported by the command that needs
them.

Commands of the other rooms register themselves: those of pipelines below, those of training (and of other packages)
by the entry point group "sluice.commands", so that no import arrow turns round.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="sluice",
    help="Curate image-text data, train linear diffusion transformers on it, distil few-step students, trace images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one option, e.g. rules.clip_score.at_least=0.28. Repeatable."),
]
Models = Annotated[
    list[str] | None, typer.Option("--models", help="Folder in which weights are looked up. Repeatable.")
]
Local = Annotated[bool, typer.Option("--local", help="Run in this one process, without Ray; the same result.")]
Workers = Annotated[int, typer.Option("--workers", help="Workers side by side; 0 takes one a core.")]
CatalogUrl = Annotated[str | None, typer.Option("--catalog", help="Lineage catalog (SQLite path or database URL).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command(epilog="Example: `sluice curate configs/dedupe.yaml --input 'data/{00000..00003}.tar' --output curated`")
def curate(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML (sluice init writes one).")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Raw data: file, folder or pattern. Repeatable.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", help="Where snapshots go (folder or URL).")] = None,
    sets: Sets = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Try the recipe on this many rows.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it would cost; run nothing.")
    ] = False,
    local: Local = False,
    workers: Workers = 0,
    models: Models = None,
    device: Annotated[str, typer.Option(help="Device of model stages: cpu or cuda.")] = "cpu",
    parent: Annotated[
        list[str] | None,
        typer.Option("--parent", help="Earlier snapshot whose held-out split is inherited. Repeatable."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Earlier snapshot whose rows are not taken again, or benchmark images or prompts. Repeatable.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure rows again that a stage could not measure, and only those.")
    ] = False,
    catalog: CatalogUrl = None,
    as_json: AsJson = False,
) -> None:
    """Measure, judge and pack raw image-text data into a snapshot."""
    from pipelines import runner
    from pipelines.recipe import load_recipe

    loaded = load_recipe(recipe, sets or [], inputs or [])
    options = runner.Options(
        output=output or loaded.output or f"curated/{recipe.stem}",
        engine="local" if local else "ray",
        workers=workers or loaded.engine.workers,
        models=(*(models or ()), *_environment_models()),
        device=device,
        limit=limit,
        parents=tuple(parent or ()),
        against=tuple(against or ()),
        retry_failed=retry_failed,
        catalog=catalog,
        quiet=as_json,
        command=runner.command_line(),
    )
    if dry_run:
        from cluster.engine import open_engine
        from cluster.storage import Folder
        from pipelines.against import with_contamination

        store = Folder(options.output)
        with open_engine("local") as engine:
            planned = with_contamination(loaded, options.against)
            typer.echo(runner.describe_plan(runner.plan_run(planned, options, store, engine), store))
        return
    _announce(runner.curate(loaded, options), as_json)


@app.command(epilog="Example: `sluice select curated --set rules.clip_score.at_least=0.3`")
def select(
    snapshot: Annotated[str, typer.Argument(help="Snapshot (or output folder: its latest) to judge again.")],
    sets: Sets = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Take the rules of this recipe instead of the snapshot's.")
    ] = None,
    measure_missing: Annotated[
        bool, typer.Option("--measure-missing", help="Measure rows that the new rules revive, at their cost.")
    ] = False,
    subset: Annotated[
        Path | None, typer.Option("--subset", help="Write the kept rows' uids here, as DataComp's sorted .npy.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on Ray; judging small data is quicker without.")] = False,
    workers: Workers = 0,
    models: Models = None,
    device: Annotated[str, typer.Option(help="Device of model stages, if any have to run.")] = "cpu",
    catalog: CatalogUrl = None,
    as_json: AsJson = False,
) -> None:
    """Judge a snapshot's rows again by other rules; measures nothing, makes a new snapshot."""
    import yaml

    from pipelines import runner
    from pipelines.readers.subset import write_subset
    from pipelines.recipe import RecipeError, load_recipe
    from pipelines.snapshot import open_snapshot

    source = open_snapshot(snapshot)
    base = {name: source.manifest["recipe"][name] for name in ("stages", "rules", "held_out", "pack")}
    if recipe is not None:
        base["rules"] = yaml.safe_load(recipe.read_text()).get("rules", {})
    for override in sets or []:
        if not override.startswith("rules."):
            raise RecipeError(
                f"--set {override}: select only judges again, so only rules.* may change; run sluice curate"
            )
    options = runner.Options(
        output="",
        engine="ray" if ray else "local",
        workers=workers,
        models=(*(models or ()), *_environment_models()),
        device=device,
        parents=(source.folder.url,),
        catalog=catalog,
        quiet=as_json,
        command=runner.command_line(),
    )
    chosen = runner.select(source, load_recipe(base, sets or []), options, measure_missing)
    _announce(chosen, as_json)
    if subset is not None:
        with subset.open("wb") as stream:
            count = write_subset(stream, chosen.subset_uids())
        typer.echo(f"wrote {subset}: {count:,} uids", err=as_json)


@app.command(epilog="Example: `sluice init photos/ --output recipe.yaml`")
def init(
    folder: Annotated[str, typer.Argument(help="Folder, file or pattern with raw data.")],
    output: Annotated[Path, typer.Option(help="Recipe to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe if it is there.")] = False,
) -> None:
    """Look at the data in a folder and write a recipe fitted to it."""
    from pipelines.fitting import fitted_recipe
    from pipelines.recipe import RecipeError

    if output.exists() and not force:
        raise RecipeError(f"{output} exists; give another --output, or --force to overwrite it")
    text, summary = fitted_recipe(folder)
    output.write_text(text)
    typer.echo(summary)
    typer.echo(f"\nwrote {output}\ntry it:  sluice curate {output} --limit 200 --output trial")


def _environment_models() -> tuple[str, ...]:
    return tuple(folder for folder in os.environ.get("SLUICE_MODELS", "").split(os.pathsep) if folder)


def _announce(snapshot: object, as_json: bool) -> None:
    """Name what was written, and the next command to type."""
    import json

    from pipelines.snapshot import Snapshot

    assert isinstance(snapshot, Snapshot)
    funnel = snapshot.manifest["funnel"]
    if as_json:
        typer.echo(json.dumps({"id": snapshot.id, "address": snapshot.folder.url, "funnel": funnel}))
        return
    typer.echo(funnel_text(funnel))
    held_out = snapshot.manifest["held_out"]
    typer.echo(f"held out  {held_out['rows']:,} of the kept rows, never trained on")
    typer.echo(f"snapshot  {snapshot.id}\n          {snapshot.folder.url}")
    typer.echo(f"report    {snapshot.folder.url}/report.html")
    typer.echo(f"next      sluice train RECIPE --data {snapshot.folder.url}")


def funnel_text(funnel: dict) -> str:
    """The funnel as a table: rows in, what failed, what each rule rejected, rows kept."""
    lines = [f"rows in   {funnel['rows_in']:,}"]
    if funnel["failed"]:
        lines.append(f"  failed  {funnel['failed']:>8,}")
        common = sorted(funnel["failures"].items(), key=lambda item: -item[1])
        lines.extend(f"          {count:>8,}  {reason}" for reason, count in common[:5])
    for step in funnel["steps"]:
        lines.append(f"  {step['rule']:20s} -{step['rejected']:<8,} {step['column']} {step['threshold']}")
    lines.append(f"kept      {funnel['kept']:,}")
    return "\n".join(lines)


def _register_all() -> None:
    for module in ("pipelines.lineage.commands", "pipelines.report.commands", "pipelines.demo.commands"):
        import_module(module).register(app)
    for point in entry_points(group="sluice.commands"):
        point.load()(app)


def main() -> None:
    """Run the command line; a user's mistake ends with one sentence and exit status 2 (SLUICE_DEBUG=1: a traceback)."""
    _register_all()
    try:
        app()
    except (ValueError, FileNotFoundError, PermissionError) as problem:
        if os.environ.get("SLUICE_DEBUG"):
            raise
        print(f"sluice: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sluice: interrupted; the same command again goes on from what is finished", file=sys.stderr)
        sys.exit(130)
