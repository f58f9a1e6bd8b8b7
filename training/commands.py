"""`sluice train`, `sluice distill` and `sluice sample`, and the functions behind them for other programs.

    run = train(load_recipe("configs/train_tiny.yaml"), data="curated", output="runs/tiny")
    samples = draw(run, ["a red circle"], output="drawings")

The driver resolves every path, writes who the run is (run.json), takes the lease, launches the workers and follows what
rank 0 says. It does no work of its own: killed and started again, it finds the run where its last checkpoint stands.

Importing this module costs nothing: torch, ray and transformers are imported where they are used.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.recipe import Recipe

Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override one option, e.g. optimizer.lr=3e-4. Repeatable.")
]
Models = Annotated[
    list[str] | None, typer.Option("--models", help="Folder in which weights are looked up. Repeatable.")
]
Output = Annotated[Path | None, typer.Option("--output", help="Folder of the run; default runs/NAME of the recipe.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --output, and refuse to begin a new one.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory a rank and steps; train nothing.")]
Local = Annotated[bool, typer.Option("--local", help="One worker in this process, without Ray.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
CatalogUrl = Annotated[str | None, typer.Option("--catalog", help="Lineage catalog (SQLite path or database URL).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def register(app: typer.Typer) -> None:
    """Add this room's commands to the `sluice` command."""
    app.command("train", epilog="Example: `sluice train configs/train_tiny.yaml --data curated --output runs/tiny`")(
        train_command
    )
    app.command(
        "distill",
        epilog="Example: `sluice distill configs/distill_tiny.yaml --teacher runs/tiny --data curated`",
    )(distill_command)
    app.command(
        "sample", epilog='Example: `sluice sample runs/tiny --prompt "a large red circle above a small blue square"`'
    )(sample_command)
    import_module("training.evaluation.commands").register(app)


# --- the commands ----------------------------------------------------------------------------------------------------


def train_command(
    recipe: Annotated[Path, typer.Argument(help="Training recipe in YAML.")],
    data: Annotated[str | None, typer.Option("--data", help="Snapshot, or output folder of sluice curate.")] = None,
    output: Output = None,
    sets: Sets = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    local: Local = False,
    device: Device = "auto",
    models: Models = None,
    catalog: CatalogUrl = None,
    as_json: AsJson = False,
) -> None:
    """Train a linear diffusion transformer on a snapshot. The same command again goes on after a kill."""
    from training.recipe import load_recipe

    loaded = load_recipe(recipe, sets or [])
    places = model_folders(models, recipe.parent)
    if dry_run:
        typer.echo(describe_plan(loaded, data=data, models=places))
        return
    run = train(
        loaded,
        data=_needed(data, "--data", "a snapshot, or the --output folder of sluice curate"),
        output=output,
        resume=resume,
        local=local,
        device=device,
        models=places,
        catalog=catalog,
        quiet=as_json,
    )
    _announce(run, as_json, f'sluice sample {run} --prompt "..."')


def distill_command(
    recipe: Annotated[Path, typer.Argument(help="Distillation recipe in YAML.")],
    teacher: Annotated[str | None, typer.Option("--teacher", help="Run, checkpoint or model to learn from.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Snapshot, or output folder of sluice curate.")] = None,
    output: Output = None,
    sets: Sets = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    local: Local = False,
    device: Device = "auto",
    models: Models = None,
    catalog: CatalogUrl = None,
    as_json: AsJson = False,
) -> None:
    """Distil a teacher into a student that draws in a few steps. The same command again goes on after a kill."""
    from training.recipe import load_recipe

    loaded = load_recipe(recipe, sets or [])
    places = model_folders(models, recipe.parent)
    whose = _needed(teacher, "--teacher", "the run or model to learn from")
    if dry_run:
        typer.echo(describe_plan(loaded, data=data, models=places, teacher=whose))
        return
    run = distill(
        loaded,
        teacher=whose,
        data=_needed(data, "--data", "a snapshot, or the --output folder of sluice curate"),
        output=output,
        resume=resume,
        local=local,
        device=device,
        models=places,
        catalog=catalog,
        quiet=as_json,
    )
    _announce(run, as_json, f'sluice sample {run} --prompt "..."  or  sluice lineage trace {run}')


def sample_command(
    ckpt: Annotated[str, typer.Argument(help="Run, checkpoint or model folder.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to draw. Repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="File with a prompt a line.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Network steps; default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Prompt i is drawn from seed + i.")] = 0,
    output: Annotated[Path, typer.Option("--output", help="Folder for the pictures.")] = Path("samples"),
    device: Device = "auto",
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures from a model: one PNG a prompt, a grid and samples.json with the seconds each took."""
    wanted = [*(prompt or []), *(_read_prompts(prompts) if prompts else [])]
    if not wanted:
        raise ValueError(
            'sample: nothing to draw: pass --prompt "a red circle", or --prompts FILE with a prompt a line'
        )
    drawn = draw(
        ckpt,
        wanted,
        output=output,
        steps=steps,
        guidance=guidance,
        seed=seed,
        device=device,
        models=model_folders(models),
    )
    if as_json:
        typer.echo(json.dumps(drawn))
        return
    typer.echo(
        f"drew      {len(wanted)} picture(s) in {drawn['steps']} steps, guidance {drawn['guidance_scale']:g}, "
        f"{drawn['seconds_per_image']:.3f} s each\n"
        f"grid      {output / 'grid.png'}\n"
        f"details   {output / 'samples.json'}\n"
        f"next      sluice lineage trace {ckpt}"
    )


# --- train and distil ------------------------------------------------------------------------------------------------


def train(recipe: Recipe, *, data: str, output: str | Path | None = None, **options: Any) -> Path:
    """Train `recipe` on the snapshot at `data`, or go on with the run in `output`; returns the run's folder.

    Options: resume, local, device, models, catalog, quiet. Raises ValueError for everything a user can repair.
    """
    return _run("train", recipe, data, output, None, **options)


def distill(
    recipe: Recipe, *, teacher: str | Path, data: str, output: str | Path | None = None, **options: Any
) -> Path:
    """Distil the model at `teacher` by the recipe's objective; otherwise as `train`. The student is RUN/model."""
    from training.checkpoint import find_model

    return _run("distill", recipe, data, output, find_model(teacher), **options)


def _run(
    kind: str,
    recipe: Recipe,
    data: str,
    output: str | Path | None,
    teacher: Path | None,
    *,
    resume: bool = False,
    local: bool = False,
    device: str = "auto",
    models: Sequence[str] = (),
    catalog: str | None = None,
    quiet: bool = False,
) -> Path:
    from cluster.storage import Folder, lease
    from cluster.workers import launch, launch_here
    from pipelines.lineage.record import record_run
    from pipelines.progress import say
    from pipelines.snapshot import open_snapshot
    from training import checkpoint as ckpt

    check(kind, recipe, teacher, models)
    snapshot = open_snapshot(data)
    if not any(shard["count"] - shard.get("held_out", 0) for shard in snapshot.manifest["shards"]):
        raise ValueError(
            f"{snapshot.folder.url}: the snapshot keeps no row to train on: look at its report for the rules"
        )
    folder = Path(output or Path("runs") / recipe.name).expanduser().absolute()
    if local:
        recipe = recipe.model_copy(update={"workers": 1})
    recipe.accumulation()
    known = _read_run(folder)
    if resume and known is None:
        raise ValueError(f"{folder}: there is no run to resume: leave --resume out to begin one")
    model = ckpt.read_model(teacher) if teacher else None
    identity = {
        "kind": kind,
        "recipe": recipe.plain(),
        "snapshot": {"id": snapshot.id, "address": snapshot.folder.url},
        "teacher": {"digest": model["digest"], "address": str(teacher)} if model else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(lease(Folder(folder), f"sluice {kind}"))
        if known is None:
            run_id = uuid.uuid4().hex
        else:
            if ckpt.checkpoints(folder):  # before the first there is nothing to continue, so nothing to differ from
                _refuse_other_run(folder, known, identity, recipe.resources())
            run_id = known["id"]
        state = {"schema_version": "1.0", "id": run_id, **identity, "versions": ckpt.versions()}
        started = known["started"] if known else time.time()
        ckpt.write_json(folder / "run.json", {**state, "started": started, "finished": None})
        done = 0
        if ckpt.checkpoints(folder):
            newest = ckpt.checkpoints(folder)[-1]
            ckpt.refuse_mismatch(newest, recipe.workers, recipe.zero_stage, recipe.precision)
            done = int(newest.name.partition("-")[2])
        token = uuid.uuid4().hex
        ckpt.Guard.begin(folder, token)
        config = {
            "kind": kind,
            "recipe": recipe.plain(),
            "snapshot": snapshot.folder.url,
            "run": str(folder),
            "run_id": run_id,
            "token": token,
            "teacher": str(teacher) if teacher else None,
            "models": list(models),
        }
        run = stack.enter_context(
            record_run(
                catalog,
                kind=kind,
                name=recipe.name,
                config=recipe.plain(),
                seeds={"weights": recipe.seed, "order": recipe.seed, "draws": recipe.seed},
                run_id=run_id,
            )
        )
        run.consume_many(_inputs(snapshot, teacher, model))
        if not quiet:
            where = "this process" if local else f"{recipe.workers} Ray worker(s)"
            again = f", from step {done:,}" if done else ""
            say(f"{kind} {recipe.name}: {recipe.steps:,} steps on snapshot {snapshot.id[:12]} in {where}{again}")
        device = choose_device(device)
        try:
            if done < recipe.steps or not (folder / "model" / "model.json").exists():
                with _followed(folder / "log.txt", quiet):
                    if local:
                        launch_here("training.loop:run", config, device=device)
                    else:
                        launch(
                            "training.loop:run",
                            config,
                            workers=recipe.workers,
                            name=f"{kind}-{recipe.name}",
                            storage=folder / "ray",
                            device=device,
                            threads=max(1, (os.cpu_count() or 1) // recipe.workers),
                            restarts=recipe.restarts,
                        )
            elif not quiet:
                say(f"{folder}: all {recipe.steps:,} steps were done before; nothing is left to do")
        finally:
            run.consume_many(_encoder_weights(folder))
            run.produce_many(_outputs(folder, kind))
        ckpt.write_json(folder / "run.json", {**state, "started": started, "finished": time.time()})
    return folder


def check(kind: str, recipe: Recipe, teacher: Path | None, models: Sequence[str] | None = None) -> None:
    """Refuse, before anything is launched, a recipe that the workers would refuse.

    models: folders in which its weights must lie; None does not look for them.
    """
    from stages.contract import Context
    from training.loop import model_config
    from training.objectives import build_objective
    from training.recipe import numeric

    objective = build_objective(numeric(recipe.objective))
    needs_teacher = "teacher" in objective.frozen
    if kind == "train" and needs_teacher:
        raise ValueError(
            f"objective.type is {objective.type}, which learns from a teacher: use sluice distill RECIPE --teacher RUN"
        )
    if kind == "distill" and not needs_teacher:
        raise ValueError(f"objective.type is {objective.type}, which has no teacher: use sluice train RECIPE")
    of_the_teacher = ("model", "resolution", "autoencoder", "text_encoder")
    for name in of_the_teacher:
        given = getattr(recipe, name)
        if teacher is None and given is None:
            raise ValueError(f"{name} is missing from the recipe: see configs/train_tiny.yaml for one that is complete")
        if teacher is not None and given is not None:
            raise ValueError(f"{name} is the teacher's in a distillation: leave it out of the recipe")
    if teacher is None:
        if models is not None:
            for section in (recipe.autoencoder, recipe.text_encoder):
                if section and "folder" in section:
                    Context(models=tuple(models)).find(str(section["folder"]))
        places, notes = models or (), list[str]()
        channels, factor = _latent_format(recipe, places, notes)
        if recipe.resolution and recipe.resolution % factor:
            raise ValueError(f"resolution {recipe.resolution} is not a multiple of {factor}, as the autoencoder needs")
        side = (recipe.resolution or 0) // factor
        model_config(recipe, (channels, side, side), _caption_channels(recipe, places, notes))


def _read_run(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    # `ray`, `lease.json` and the like may be left of an attempt that was killed at once; anything else is not ours.
    strangers = [entry.name for entry in folder.iterdir() if entry.name != "lease.json"] if folder.is_dir() else []
    if strangers:
        raise ValueError(f"{folder} holds {strangers[0]!r} and no run.json: choose an --output that is empty or a run")
    return None


def _refuse_other_run(folder: Path, known: dict[str, Any], wanted: dict[str, Any], resources: frozenset[str]) -> None:
    """A run is continued as it began: what was asked for then must be asked for now, resources aside."""
    from training.recipe import changes_to

    if known["kind"] != wanted["kind"]:
        raise ValueError(f"{folder} is a {known['kind']} run, not a {wanted['kind']} run: choose another --output")
    for name, field in (("snapshot", "id"), ("teacher", "digest")):
        before, now = (known[name] or {}).get(field), (wanted[name] or {}).get(field)
        if before != now:
            raise ValueError(
                f"{folder} was begun with {name} {before}, now asked for is {now}: pass the one it was begun with, or "
                "begin a new run with another --output"
            )
    for path, before, now in changes_to(known["recipe"], wanted["recipe"]):
        if path.split(".")[0] not in resources:
            raise ValueError(
                f"{folder} was begun with {path} {before!r}, the recipe now says {now!r}: a run is continued as it "
                "began; put it back, or begin a new run with another --output"
            )


def _inputs(snapshot: Any, teacher: Path | None, model: dict[str, Any] | None) -> list[Any]:
    from pipelines.lineage.record import Artifact

    kept = sum(shard["count"] for shard in snapshot.manifest["shards"])
    found = [Artifact(kind="snapshot", digest=snapshot.id, address=snapshot.folder.url, facts={"kept": kept})]
    if teacher is not None and model is not None:
        kind = "student" if model["kind"] == "student" else "model"
        found.append(Artifact(kind=kind, digest=model["digest"], address=str(teacher), name=model.get("name", "")))
    return found


def _encoder_weights(folder: Path) -> list[Any]:
    """The frozen networks that a run stood on, as its newest model names them."""
    from pipelines.lineage.record import Artifact
    from training import checkpoint as ckpt

    for checkpoint in reversed(ckpt.checkpoints(folder)):
        described = ckpt.read_model(checkpoint / "model")
        return [
            Artifact(kind="weights", digest=part["digest"], name=name, address=str(part["folder"]))
            for name, part in (("text_encoder", described["text_encoder"]), ("autoencoder", described["autoencoder"]))
            if "folder" in part  # an autoencoder without weights is no artifact
        ]
    return []


def _outputs(folder: Path, kind: str) -> Iterator[Any]:
    from pipelines.lineage.record import Artifact
    from training import checkpoint as ckpt

    for checkpoint in ckpt.checkpoints(folder):
        meta = ckpt.read_meta(checkpoint)
        yield Artifact(
            kind="checkpoint",
            digest=meta["digest"],
            address=str(checkpoint),
            name=checkpoint.name,
            facts={"step": meta["step"], "zero_stage": meta["zero_stage"], "workers": meta["workers"]},
        )
    if (folder / "model" / "model.json").exists():
        model = ckpt.read_model(folder / "model")
        yield Artifact(
            kind="student" if kind == "distill" else "model",
            digest=model["digest"],
            address=str(folder / "model"),
            name=model["name"],
            facts={"steps": model["trained_steps"], "method": model["method"], "sampling_steps": model["steps"]},
        )


@contextmanager
def _followed(path: Path, quiet: bool) -> Iterator[None]:
    """Print what the workers append to `path` while the block runs."""
    from pipelines.progress import say

    place = path.stat().st_size if path.exists() else 0
    ended = threading.Event()

    def follow() -> None:
        nonlocal place
        last_round = False
        while not last_round:
            last_round = ended.wait(0.5)
            if not path.exists():
                continue
            with open(path, encoding="utf-8") as stream:
                stream.seek(place)
                text = stream.read()
            whole = text[: text.rfind("\n") + 1]
            place += len(whole.encode())
            for line in whole.splitlines():
                say(f"  {line}")

    if quiet:
        yield
        return
    follower = threading.Thread(target=follow, name="follow", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def choose_device(asked: str) -> str:
    """ "cpu" or "cuda"; "auto" takes a GPU where torch finds one."""
    if asked not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {asked!r}: write cpu, cuda or auto")
    if asked == "cpu":
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ValueError("--device cuda: torch finds no GPU on this machine: leave the option out to use the CPU")
    return "cpu"


def model_folders(given: Sequence[str] | None, beside: Path | None = None) -> tuple[str, ...]:
    """Where weights are looked up, absolute: --models, $SLUICE_MODELS, beside the recipe, here, what Sluice ships."""
    from pipelines.runner import SHIPPED_MODELS

    named = [*(given or ()), *os.environ.get("SLUICE_MODELS", "").split(os.pathsep)]
    places: list[str | Path] = [*(folder for folder in named if folder), *([beside] if beside else []), Path.cwd()]
    return (*(str(Path(place).expanduser().absolute()) for place in places), str(SHIPPED_MODELS))


def _announce(run: Path, as_json: bool, following: str) -> None:
    """Name what was written, and the next command to type."""
    from training.checkpoint import read_model

    model = read_model(run / "model")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {split: [line["loss"] for line in lines if line["split"] == split] for split in ("train", "held_out")}
    last = {split: values[-1] for split, values in losses.items() if values}
    if as_json:
        found = {"run": str(run), "model": str(run / "model"), "digest": model["digest"], "loss": last}
        typer.echo(json.dumps(found))
        return
    shown = ", ".join(f"{value:.4f} ({split})" for split, value in last.items() if value is not None)
    typer.echo(
        f"{model['kind']:9s} {run / 'model'}\n"
        f"digest    {model['digest']}\n"
        f"loss      {shown} after {model['trained_steps']:,} steps\n"
        f"metrics   {run / 'metrics.jsonl'}\n"
        f"next      {following}"
    )


def _needed(value: str | None, option: str, what: str) -> str:
    if value is None:
        raise ValueError(f"{option} is missing: pass {what}")
    return value


# --- the plan --------------------------------------------------------------------------------------------------------


def describe_plan(
    recipe: Recipe, *, data: str | None = None, models: Sequence[str] = (), teacher: str | Path | None = None
) -> str:
    """What a run would be: sizes, memory a rank, steps and epochs. Needs no weights; says where it had to assume."""
    import torch

    from training import checkpoint as ckpt
    from training.linear_dit import LinearDiT, LinearDiTConfig
    from training.loop import model_config
    from training.zero import estimate_memory

    teacher_folder = ckpt.find_model(teacher) if teacher else None
    check("distill" if teacher_folder else "train", recipe, teacher_folder)  # weights need not be here
    notes: list[str] = []
    if teacher_folder:
        config = LinearDiTConfig.from_diffusers_config(
            json.loads((teacher_folder / "transformer" / "config.json").read_text())
        )
        resolution = ckpt.read_model(teacher_folder)["resolution"]
    else:
        resolution = recipe.resolution or 0
        channels, factor = _latent_format(recipe, models, notes)
        side = resolution // factor
        config = model_config(recipe, (channels, side, side), _caption_channels(recipe, models, notes))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LinearDiT(config, initialise=False).parameters())
    side = config.sample_size // config.patch_size
    memory = estimate_memory(
        recipe,
        parameters,
        recipe.workers,
        tokens=side * side,
        width=config.width,
        depth=config.num_layers,
        frozen_parameters=parameters if teacher_folder else 0,
    )
    batch = recipe.batch
    held = ", ".join(f"{name} {_size(value)}" for name, value in vars(memory).items() if value)
    each = _size(parameters * (18 if recipe.ema_decay else 14))
    lines = [
        f"{recipe.name}: {recipe.objective.get('type')} for {recipe.steps:,} steps",
        f"  model       {parameters:,} parameters: width {config.width}, depth {config.num_layers}, "
        f"{side * side} image tokens",
        f"  pictures    {resolution} px, latents {config.in_channels}x{config.sample_size}x{config.sample_size}; "
        f"text features of {config.caption_channels} channels",
        f"  batch       {batch.global_batch} = {recipe.workers} worker(s) x {batch.micro_batch} x "
        f"{recipe.accumulation()} accumulated; {recipe.steps * batch.global_batch:,} samples in all",
        f"  optimizer   {recipe.optimizer.type}, lr {recipe.optimizer.lr:g} after {recipe.optimizer.warmup_steps:,} "
        f"steps of warm-up, gradients clipped at {recipe.optimizer.gradient_clipping:g}, EMA {recipe.ema_decay:g}",
        f"  memory      {_size(memory.total)} a rank at ZeRO stage {recipe.zero_stage} in {recipe.precision}: {held}",
        f"  checkpoint  every {recipe.checkpoint_every:,} steps, about {each} each, "
        f"{recipe.keep_checkpoints or 'all'} kept",
    ]
    if data is not None:
        lines.append(_data_line(recipe, data))
    return "\n".join([*lines, *(f"  note        {note}" for note in notes)])


def _data_line(recipe: Recipe, data: str) -> str:
    from pipelines.snapshot import open_snapshot

    snapshot = open_snapshot(data)
    held_out = sum(shard.get("held_out", 0) for shard in snapshot.manifest["shards"])
    rows = sum(shard["count"] for shard in snapshot.manifest["shards"]) - held_out
    epochs = recipe.steps * recipe.batch.global_batch / max(rows, 1)
    return (
        f"  data        snapshot {snapshot.id[:12]}: {rows:,} rows to train on ({epochs:.1f} epochs), "
        f"{held_out:,} held out"
    )


def _latent_format(recipe: Recipe, models: Sequence[str], notes: list[str]) -> tuple[int, int]:
    """(channels, pixels a latent pixel) of the recipe's autoencoder, from its config alone where it is a folder."""
    from stages.autoencoders import open_autoencoder
    from training.recipe import numeric

    options = numeric(recipe.autoencoder)
    if options.get("type") != "dc_ae":
        opened = open_autoencoder(options, models=tuple(models))
        return opened.latent_channels, opened.spatial_factor
    found = _config_in(options.get("folder"), models)
    if found is None:
        channels = int((recipe.model or {}).get("in_channels", 32))
        notes.append(
            f"autoencoder {options.get('folder')!r} is not here: f32 with {channels} channels is assumed; pass "
            "--models FOLDER"
        )
        return channels, 32
    return int(found["latent_channels"]), 2 ** (len(found["encoder_block_out_channels"]) - 1)


def _caption_channels(recipe: Recipe, models: Sequence[str], notes: list[str]) -> int:
    found = _config_in((recipe.text_encoder or {}).get("folder"), models)
    if found is not None:
        return int(found["hidden_size"])
    channels = int((recipe.model or {}).get("caption_channels", 2304))
    name = (recipe.text_encoder or {}).get("folder")
    notes.append(f"text encoder {name!r} is not here: {channels} channels are assumed; pass --models FOLDER")
    return channels


def _config_in(folder: Any, models: Sequence[str]) -> dict[str, Any] | None:
    from stages.contract import Context

    try:
        path = Context(models=tuple(models)).find(str(folder))
    except FileNotFoundError:
        return None
    inner = next((place for place in (path, path / "text_encoder") if (place / "config.json").is_file()), None)
    return json.loads((inner / "config.json").read_text()) if inner else None


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(
    ckpt: str | Path,
    prompts: Sequence[str],
    *,
    output: str | Path,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "auto",
    models: Sequence[str] = (),
    batch: int = 16,
) -> dict[str, Any]:
    """Draw `prompts` into `output` (NNN.png, grid.png, samples.json) and return what samples.json holds.

    Picture i comes from seed + i, whatever is drawn beside it. The seconds are those of encoding prompts, sampling and
    decoding; loading the model is timed apart.
    """
    from training.checkpoint import find_model, read_model, write_json
    from training.painters import SluicePainter

    folder = find_model(ckpt)
    model = read_model(folder)
    device = choose_device(device)
    sampling = dict(model["sampling"])
    sampling |= {"steps": steps} if steps is not None else {}
    sampling |= {"guidance_scale": guidance} if guidance is not None else {}
    started = time.perf_counter()
    painter = SluicePainter(folder, sampling, device, models)
    painter.draw(prompts[:1], [seed], steps=1)  # the first pass of a process allocates: not what a picture costs
    loaded = time.perf_counter() - started
    images: list[Any] = []
    started = time.perf_counter()
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        images += painter.draw(part, range(seed + first, seed + first + len(part)))
    seconds = time.perf_counter() - started
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    names = [f"{place:03d}.png" for place in range(len(images))]
    for image, name in zip(images, names, strict=True):
        image.save(target / name)
    grid(images).save(target / "grid.png")
    described = {
        "schema_version": "1.0",
        "model": {name: model.get(name) for name in ("kind", "name", "method", "digest", "trained_steps")},
        "address": str(folder),
        **{name: sampling.get(name) for name in ("sampler", "steps", "guidance_scale", "flow_shift")},
        "resolution": model["resolution"],
        "device": device,
        "seconds_per_image": seconds / len(prompts),
        "seconds_to_load": loaded,
        "samples": [
            {"file": name, "prompt": prompt, "seed": seed + place}
            for place, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        ],
    }
    write_json(target / "samples.json", described)
    return described


def grid(images: Sequence[Any], across: int | None = None) -> Any:
    """Pictures of one size side by side on white, as square as they go; small ones enlarged to be seen."""
    from PIL import Image

    across = across or max(1, round(len(images) ** 0.5 + 0.49))
    side = max(images[0].size)
    scale = max(1, 128 // side)
    cell, gap = side * scale, 4
    down = -(-len(images) // across)
    sheet = Image.new("RGB", (across * (cell + gap) + gap, down * (cell + gap) + gap), "white")
    for place, image in enumerate(images):
        enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (gap + place % across * (cell + gap), gap + place // across * (cell + gap)))
    return sheet


def _read_prompts(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{path}: there is no prompt in it: write one a line")
    return found
