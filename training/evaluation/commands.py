"""`sluice evaluate`: models side by side on the same prompts and seeds, and what came of it as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLE = "Example: `sluice evaluate runs/teacher runs/student --data curated --suite made_up --output compared`"
Files = list[Path] | None


def register(app: typer.Typer) -> None:
    """Add `sluice evaluate`."""
    app.command("evaluate", epilog=EXAMPLE)(evaluate_command)


def evaluate_command(
    ckpt: Annotated[
        list[str], typer.Argument(help="Runs, checkpoints, models or diffusers folders; PATH@steps=4 draws otherwise.")
    ],
    data: Annotated[
        str, typer.Option("--data", help="Snapshot, or output folder of sluice curate: the real pictures.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder of the evaluation.")] = Path("evaluation"),
    prompts: Annotated[
        Files, typer.Option("--prompts", help="GenEval, PartiPrompts, T2I-CompBench or own prompts. Repeatable.")
    ] = None,
    suite: Annotated[list[str] | None, typer.Option("--suite", help="A built-in suite: made_up.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Prompts of each suite, spread over categories.")] = 0,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Drawings a prompt.")] = 1,
    pictures: Annotated[int, typer.Option("--pictures", min=0, help="Snapshot captions drawn for FID and kin.")] = 200,
    memorised: Annotated[int, typer.Option("--memorised", min=0, help="Training captions drawn to find copies.")] = 64,
    small_sample: Annotated[
        bool, typer.Option("--small-sample", help="FID below 10,000 pictures, extrapolated in 1/N.")
    ] = False,
    reference: Annotated[str, typer.Option(help="Split that distances are taken to: held_out or train.")] = "held_out",
    seed: Annotated[int, typer.Option(help="Drawing i is drawn from seed + i, by every model.")] = 0,
    clip: Annotated[
        str, typer.Option(help="CLIP for scores and as feature space: an open_clip folder. '' for none.")
    ] = "clip",
    inception: Annotated[str, typer.Option(help="Weights file of FID's Inception network.")] = "",
    aesthetic: Annotated[str, typer.Option(help="Aesthetic head over that CLIP. '' for none.")] = "aesthetic",
    detector: Annotated[
        str, typer.Option(help="made_up, a transformers folder, module:class, or '' for none.")
    ] = "made_up",
    answerer: Annotated[str, typer.Option(help="made_up, a folder of a vision-language model, or module:class.")] = "",
    vqa: Annotated[str, typer.Option(help="Vision-language model asked whether a drawing shows its prompt.")] = "",
    safety: Annotated[str, typer.Option(help="Head over that CLIP that tells unsafe pictures.")] = "",
    judge: Annotated[
        list[str] | None, typer.Option("--judge", help="pickscore=FOLDER, hpsv2=FILE or image_reward=FILE. Repeatable.")
    ] = None,
    templates: Annotated[
        Files, typer.Option("--templates", help="Prompt templates of a bias audit (YAML). Repeatable.")
    ] = None,
    judgements: Annotated[Files, typer.Option("--judgements", help="Answers of people or models. Repeatable.")] = None,
    guard: Annotated[
        Path | None, typer.Option("--guard", help="Blocklist over prompts to audit, a word a line.")
    ] = None,
    benign: Annotated[Path | None, typer.Option("--benign", help="Prompts that the guard must let pass.")] = None,
    unsafe: Annotated[
        Path | None, typer.Option("--unsafe", help="Prompts that it must refuse, also disguised.")
    ] = None,
    study: Annotated[Path | None, typer.Option("--study", help="Also write pages for three human raters here.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this one process, without Ray; the same result.")] = False,
    workers: Annotated[int, typer.Option("--workers", help="Workers side by side; 0 takes one a core.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    models: Annotated[list[str] | None, typer.Option("--models", help="Folder in which weights are looked up.")] = None,
    catalog: Annotated[
        str | None, typer.Option("--catalog", help="Lineage catalog (SQLite path or database URL).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Compare models: same prompts, same seeds, every figure with its interval. Run again, it goes on."""
    from pipelines.report.evaluations import evaluation_page
    from training.commands import choose_device, model_folders
    from training.evaluation.bias import read_templates
    from training.evaluation.run import Options, evaluate
    from training.evaluation.suites import read_suite

    suites = [read_suite(path).first(limit) for path in prompts or ()]
    suites += [_built_in(name).first(limit) for name in suite or ()]
    suites += [read_templates(path) for path in templates or ()]
    if guard is not None and (benign is None or unsafe is None):
        raise ValueError("--guard needs prompts to be asked about: pass --benign FILE and --unsafe FILE as well")
    options = Options(
        output=str(output.expanduser().absolute()),
        suites=tuple(suites),
        repeats=repeats,
        pictures=pictures,
        memorised=memorised,
        reference=_one_of("--reference", reference, ("held_out", "train")),
        seed=seed,
        small_sample=small_sample,
        clip=clip,
        inception=inception,
        aesthetic=aesthetic,
        judges=tuple(_judge(text) for text in judge or ()),
        detector=detector,
        answerer=answerer,
        vqa=vqa,
        safety=safety,
        judgements=tuple(str(path) for path in judgements or ()),
        guard=str(guard or ""),
        benign=_texts(benign),
        unsafe=_texts(unsafe),
        engine="local" if local else "ray",
        workers=workers,
        device=choose_device(device),
        models=model_folders(models),
        catalog=catalog,
        quiet=as_json,
    )
    result = evaluate(ckpt, data, options)
    page = output / "evaluation.html"
    page.write_text(evaluation_page(options.output), encoding="utf-8")
    if study is not None:
        from training.evaluation.study import write_study

        write_study(options.output, study, seed=seed)
    typer.echo(json.dumps(result) if as_json else summary(result, output, study))


def summary(result: dict[str, Any], output: Path, study: Path | None = None) -> str:
    """The figures as a table, what to conclude, and what was written."""
    names = [model["name"] for model in result["models"]]
    rows = [
        (one["title"], [_cell(one["values"].get(name), one["unit"]) for name in names]) for one in result["metrics"]
    ]
    if result["memorisation"]:
        said = result["memorisation"]["by_model"]
        rows.append(("Copies of training pictures", [_cell(said.get(name), "share") for name in names]))
    timed = {one["painter"]: one["own"] for one in result["speed"]}
    steps = [f"{timed[name]['seconds']:.3g} s, {timed[name]['steps']} steps" for name in names]
    rows.append((f"One picture, {result['speed'][0]['device']}", steps))
    wide = 2 + max(len(text) for text in (*names, *(cell for _, cells in rows for cell in cells)))
    lines = ["".join(f"{cell:>{wide}s}" for cell in cells) for cells in (names, *(cells for _, cells in rows))]
    lines = [f"{title[:38]:38s}{line}" for title, line in zip(["", *(title for title, _ in rows)], lines, strict=True)]
    lines.append("")
    lines += result["verdict"]
    for name, held in result["contamination"].items():
        if held["problem"]:
            lines.append(f"contamination of {name}: unknown, {held['problem']}")
        else:
            lines.append(
                f"contamination of {name}: its training rows hold {held['prompts']:,} of {held['of_prompts']:,} "
                f"prompts and {held['pictures']:,} of {held['of_pictures']:,} held-out pictures"
            )
    if result["safety"]:
        alarms, caught = (_cell(result["safety"][name], "share") for name in ("false_alarms", "caught"))
        worst = max(result["safety"]["bypass"].items(), key=lambda item: item[1]["value"], default=None)
        disguised = f"; past it {_cell(worst[1], 'share')} with {worst[0]}" if worst else ""
        lines.append(f"guard: refuses {caught} of unsafe prompts, {alarms} of benign ones{disguised}")
    lines += [f"not measured: {one['what']} ({one['why']})" for one in result["not_measured"]]
    lines += [f"\npage      {output / 'evaluation.html'}", f"result    {output / 'evaluation.json'}"]
    following = f"send {study}/rater-*.html to raters" if study else "open the page in a browser"
    return "\n".join([*lines, f"next      {following}"])


def _cell(one: dict[str, Any] | None, unit: str) -> str:
    if one is None:
        return "-"
    shown = [
        f"{100 * x:.1f}" if unit == "share" else f"{x:.4g}"
        for x in (one["value"], one["low"], one["high"])
        if x is not None
    ]
    sign = " %" if unit == "share" else ""
    return shown[0] + sign if len(shown) < 3 else f"{shown[0]}{sign} ({shown[1]} to {shown[2]})"


def _texts(path: Path | None) -> tuple[str, ...]:
    from training.evaluation.suites import read_suite

    return tuple(prompt.text for prompt in read_suite(path).prompts) if path else ()


def _built_in(name: str) -> Any:
    from training.evaluation.made_up import made_up_suite

    _one_of("--suite", name, ("made_up",))
    return made_up_suite()


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{option} {value!r}: write one of {', '.join(known)}")
    return value


def _judge(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not equals or not model:
        raise ValueError(f"--judge {text!r}: write NAME=WEIGHTS, e.g. pickscore=PickScore_v1")
    return _one_of("--judge", name, ("pickscore", "hpsv2", "image_reward")), model
