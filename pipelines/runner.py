"""The runner: a plan carried out on an engine, unit by unit, until a snapshot stands.

    fingerprint the input -> measure (cheap stages, then costly ones on the rows their gates let through)
      -> judge (rules and barriers over small columns) -> pack (ledger, captions, features, tars) -> manifest

Each arrow ends in committed files named by what went into them. A killed run, started again, finds what is finished
and does the rest; the bytes are the same. `select` is the same road without measuring.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.engine import Engine, LocalEngine, open_engine
from cluster.storage import Folder, absolute, lease
from pipelines.against import (
    Held,
    benchmark_name,
    benchmark_recipe,
    hold_benchmark,
    hold_snapshot,
    split_addresses,
    with_contamination,
)
from pipelines.changes import changes, stage_facts, told
from pipelines.judge import JudgedShard, NotMeasuredError
from pipelines.judging import FOLDER as JUDGING
from pipelines.judging import Case, judge_all, judge_gate
from pipelines.measure import MeasureWorker, read_columns
from pipelines.packing import PACKING_VERSION, PackWorker, captioners, ledger_columns
from pipelines.plan import Pass, Plan, count_missing, make_plan
from pipelines.progress import Progress, say
from pipelines.readers import READER_VERSION, InputShard, discover, names_images, shard_digest
from pipelines.recipe import Input, Pack, Recipe, RecipeError
from pipelines.scales import scale_warnings
from pipelines.snapshot import Snapshot, SnapshotError, open_snapshot, write_snapshot
from stages.contract import Context, digest_of
from stages.rules import Rule

SMALL_INPUT_BYTES = 256 << 20
if TYPE_CHECKING:
    from pipelines.lineage.record import Run

FINGERPRINTS = "units/fingerprints.json"
RETRIED = "units/retried.json"
# Weights of the made-up world lie in the package, so that its recipes run anywhere.
SHIPPED_MODELS = str(Path(__file__).parent / "demo" / "weights")


@dataclass
class Options:
    """How to run: nothing here changes what comes out, but for `limit` (fewer rows), `parents` (inherited sides) and
    `against` (snapshots and benchmarks that rows are held against). retry_failed: measure rows again that a stage could
    not measure, and only those."""

    output: str
    engine: str = "ray"
    workers: int = 0
    models: tuple[str, ...] = ()
    device: str = "cpu"
    limit: int = 0
    parents: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    retry_failed: bool = False
    catalog: str | None = None
    quiet: bool = False
    command: str = ""
    report: bool = True


@dataclass
class Measured:
    """Where everything measured lies: for each shard its rows, and for each stage the path of its unit."""

    shards: list[JudgedShard] = field(default_factory=list)


class FingerprintWorker:
    """Digests input shards where the data is near."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        shard = InputShard.from_json(task)
        digest = shard_digest(shard)
        return {
            "key": fingerprint_key(shard),
            # A shard of which only the first rows are read is other input than the whole.
            "digest": digest_of(digest, shard.limit) * 2 if shard.limit else digest,
            # Images in files of their own may change behind the back of the table that names them.
            "remember": not names_images(shard),
        }


def fingerprint_key(shard: InputShard) -> str:
    """What a shard's digest is remembered under: any change of place, size or time means reading it again."""
    return digest_of({**asdict(shard), "dataset": ""})


def curate(recipe: Recipe, options: Options) -> Snapshot:
    """Run a recipe and return its snapshot. Raises RecipeError, FileNotFoundError, LeaseHeldError."""
    started = _now()
    store = Folder(options.output)
    recipe = with_contamination(recipe, options.against)
    with lease(store, options.command or "sluice curate"), open_engine(options.engine, options.workers) as engine:
        plan = plan_run(recipe, options, store, engine)
        if not options.quiet:
            for warning in scale_warnings(plan, store):
                say(f"  warning: {warning}")
        plan.held = hold(recipe, store, engine, options)
        with _recorded("curate", plan, store, options) as run:
            measured = measure(plan, store, engine, options)
            return _finish(plan, measured, store, engine, options, started, run)


def plan_run(recipe: Recipe, options: Options, store: Folder, engine: Engine) -> Plan:
    """Discover and fingerprint the input, and resolve the recipe against it."""
    shards = discover(recipe.input)
    if options.limit:
        shards = limited(shards, options.limit)
    digests = fingerprint(shards, store, engine, options)
    plan = make_plan(recipe, shards, digests, context_of(recipe, options))
    plan.retried = store.read_json(RETRIED) if store.exists(RETRIED) else {}
    return plan


def hold(recipe: Recipe, store: Folder, engine: Engine, options: Options) -> Held:
    """Files with the rows of the snapshots and benchmarks that the run is held against; benchmarks are measured."""
    snapshots, benchmarks = split_addresses(options.against)
    files = []
    for address in benchmarks:
        whole = replace(options, limit=0, retry_failed=False)
        plan = plan_run(replace(benchmark_recipe(recipe), input=(Input(address),)), whole, store, engine)
        files.append(hold_benchmark(measure(plan, store, engine, options).shards, recipe, store))
    return Held(
        tuple(hold_snapshot(snapshot, recipe, store) for snapshot in snapshots),
        tuple(f"snapshot {snapshot.id[:12]}" for snapshot in snapshots),
        tuple(files),
        tuple(f"benchmark {benchmark_name(address)}" for address in benchmarks),
    )


def _case(plan: Plan, shards: Sequence[JudgedShard], rules: Mapping[str, Rule], stages: Sequence[str]) -> Case:
    held = plan.held
    names = {"held_names": held.snapshot_names, "benchmark_names": held.benchmark_names}
    before = dict(plan.rules_before)
    return Case(tuple(shards), rules, tuple(stages), before, held.snapshots, benchmarks=held.benchmarks, **names)


def context_of(recipe: Recipe, options: Options) -> Context:
    folders = [absolute(folder) for folder in (*options.models, *recipe.models)]
    cache = recipe.cache or (f"{options.output}/answers" if Folder(options.output).is_local else "")
    return Context((*folders, str(Path.cwd()), SHIPPED_MODELS), options.device, absolute(cache) if cache else "")


def limited(shards: Sequence[InputShard], limit: int) -> list[InputShard]:
    """The first rows of up to eight shards spread over the input, `limit` rows at most in all."""
    count = min(8, len(shards), limit)
    spread = [shards[place * len(shards) // count] for place in range(count)]
    return [replace(shard, limit=limit // count + (place < limit % count)) for place, shard in enumerate(spread)]


def fingerprint(shards: Sequence[InputShard], store: Folder, engine: Engine, options: Options) -> list[str]:
    """Content digests of the shards, remembered by place, size and time of change."""
    known: dict[str, str] = store.read_json(FINGERPRINTS) if store.exists(FINGERPRINTS) else {}
    keys = [fingerprint_key(shard) for shard in shards]
    fresh = [shard for shard, key in zip(shards, keys, strict=True) if key not in known]
    passing: dict[str, str] = {}
    if fresh:
        near = _near(engine, shards)
        with Progress("fingerprint input", len(fresh), quiet=options.quiet) as progress:
            for result in near.map(FingerprintWorker, {}, [shard.to_json() for shard in fresh]):
                (known if result["remember"] else passing)[result["key"]] = result["digest"]
                progress.advance()
        store.write_json(FINGERPRINTS, known)
    return _told_apart([known.get(key) or passing[key] for key in keys], shards)


def _told_apart(digests: Sequence[str], shards: Sequence[InputShard]) -> list[str]:
    """The digests, those of a second file with the same bytes made another, since an occurrence is named by its
    shard. Raises RecipeError where one file is given twice."""
    seen: dict[str, list[InputShard]] = {}
    for digest, shard in zip(digests, shards, strict=True):
        if any((shard.address, shard.members) == (other.address, other.members) for other in seen.get(digest, ())):
            raise RecipeError(f"input shard {shard.address} is given twice; leave one of them out")
        seen.setdefault(digest, []).append(shard)
    counts: dict[str, int] = {}
    told = []
    for digest in digests:
        again = counts[digest] = counts.get(digest, -1) + 1
        told.append(digest_of("the same bytes again", digest, again) * 2 if again else digest)
    return told


def _near(engine: Engine, shards: Sequence[InputShard]) -> Engine:
    """`engine`, or this process where the input is so small that starting a worker costs more than the work."""
    return LocalEngine() if sum(shard.size_bytes for shard in shards) < SMALL_INPUT_BYTES else engine


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(plan: Plan, store: Folder, engine: Engine, options: Options) -> Measured:
    """Run every pass of the plan; units that are finished already are not touched."""
    units: list[dict[str, str]] = [{} for _ in plan.shards]
    gates: dict[int, list[tuple[str, str]]] = {0: [("", "")] * len(plan.shards)}
    for part in plan.passes:
        if part.rules_before not in gates:
            gates[part.rules_before] = _judge_gate(plan, units, part.rules_before, store, engine)
        gate = gates[part.rules_before]
        for place, digest in enumerate(plan.digests):
            for job in part.jobs:
                units[place][job.name] = plan.unit_path(job.name, digest, gate[place][1])
        known = _take_up(plan, part, units, store, options) if options.retry_failed else {}
        _run_pass(plan, part, units, gate, store, engine, options, known)
        if known:
            store.write_json(RETRIED, plan.retried)
    return Measured(_judged_shards(plan, units))


def _take_up(
    plan: Plan, part: Pass, units: list[dict[str, str]], store: Folder, options: Options
) -> dict[tuple[str, str], str]:
    """Name new units for those with rows that a stage could not measure; (shard digest, stage) -> the earlier unit.

    An earlier unit behind another gate (rows taken up before have passed it meanwhile) serves as well: what it knows is
    not measured again.
    """
    try:
        latest = open_snapshot(store.url)
        earlier = {
            item["digest"]: mine
            for item, mine in zip(latest.manifest["inputs"], latest.provenance()["units"], strict=True)
        }
    except SnapshotError:
        earlier = {}
    known: dict[tuple[str, str], str] = {}
    failed = 0
    for place, digest in enumerate(plan.digests):
        for job in part.jobs:
            path = units[place][job.name]
            old = path if store.exists(path) else earlier.get(digest, {}).get(job.name, "")
            if old.rpartition("/")[0] != path.rpartition("/")[0] or not store.exists(old):
                continue
            count = _failed_rows(store, plan.rows_path(digest), old)
            if count or old != path:
                new = path if old != path else f"{path.removesuffix('.parquet')}-{digest_of('retry', path)[:8]}.parquet"
                known[digest, job.name] = old
                units[place][job.name] = new
                # A unit that was taken up before is known by the name of the first of them.
                names = [first for first, newest in plan.retried.items() if newest == path] or [path]
                if new != path:
                    plan.retried.update(dict.fromkeys([*names, path], new))
                failed += count
    if not options.quiet:
        say(f"  {', '.join(job.name for job in part.jobs)}: {failed:,} failed rows are taken up again")
    return known


def _failed_rows(store: Folder, rows: str, unit: str) -> int:
    """Rows that were read and that a stage was given and could not measure."""
    read = read_columns(store, rows, ["error"])["error"].to_pylist()
    errors = read_columns(store, unit, ["error"])["error"].to_pylist()
    return sum(
        error is not None and before is None and not error.startswith("not_measured(")
        for before, error in zip(read, errors, strict=True)
    )


def _judged_shards(plan: Plan, units: Sequence[Mapping[str, str]]) -> list[JudgedShard]:
    return [
        JudgedShard(digest, plan.rows_path(digest), dict(mine), shard.dataset)
        for shard, digest, mine in zip(plan.shards, plan.digests, units, strict=True)
    ]


def _judge_gate(
    plan: Plan, units: Sequence[Mapping[str, str]], rules_before: int, store: Folder, engine: Engine
) -> list[tuple[str, str]]:
    """(path, digest) of each shard's gate: which rows have passed the first `rules_before` rules."""
    names = list(plan.recipe.rules)[:rules_before]
    rules = {name: plan.recipe.rules[name] for name in names}
    measured = [name for name in plan.recipe.stages if units and name in units[0]]
    shards = _judged_shards(plan, units)
    key = digest_of(
        "gate",
        [[name, rule.type, rule.version, rule.options()] for name, rule in rules.items()],
        [[shard.digest, shard.dataset, sorted(shard.units.items())] for shard in shards],
        plan.held.identity(),
    )
    done, paths = f"units/gates/{key}.json", [f"units/gates/{key}-{place:06d}.parquet" for place in range(len(shards))]
    if not store.exists(done):
        case = _case(plan, shards, rules, measured)
        store.write_json(done, judge_gate(_near(engine, plan.shards), store, case, paths))
    return list(zip(paths, store.read_json(done), strict=True))


def _run_pass(
    plan: Plan,
    part: Pass,
    units: Sequence[Mapping[str, str]],
    gate: Sequence[tuple[str, str]],
    store: Folder,
    engine: Engine,
    options: Options,
    known: Mapping[tuple[str, str], str],
) -> None:
    tasks = []
    for place, (shard, digest) in enumerate(zip(plan.shards, plan.digests, strict=True)):
        todo = [job.name for job in part.jobs if not store.exists(units[place][job.name])]
        if todo:
            tasks.append(
                {
                    "shard": shard.to_json(),
                    "digest": digest,
                    "rows": plan.rows_path(digest),
                    "units": dict(units[place]),
                    "todo": todo,
                    "gate": gate[place][0],
                    "known": {name: known[digest, name] for name in todo if (digest, name) in known},
                }
            )
    title = ", ".join(job.name for job in part.jobs)
    finished = len(plan.shards) - len(tasks)
    if finished and not options.quiet:
        say(f"  {title}: {finished:,} of {len(plan.shards):,} shards are finished already")
    if not tasks:
        return
    config = {
        "store": store.url,
        "models": list(plan.context.models),
        "device": plan.context.device,
        "cache": plan.context.cache,
        "transport_batch": plan.recipe.engine.transport_batch,
        "jobs": [job.to_json() for job in part.jobs],
    }
    gpus = max(job.stage.resources.gpus for job in part.jobs) if plan.context.device != "cpu" else 0.0
    with Progress(title, len(tasks), quiet=options.quiet) as progress:
        for result in engine.map(MeasureWorker, config, tasks, gpus=gpus):
            progress.advance(rows=result["rows"], spent=result["spent"])


# --- judging and packing ---------------------------------------------------------------------------------------------


def _finish(
    plan: Plan, measured: Measured, store: Folder, engine: Engine, options: Options, started: str, run: Run
) -> Snapshot:
    judged = _judge(plan, measured, store, engine, options)
    packed = _pack(plan, measured, judged, store, engine, options)
    manifest = {
        "parents": [open_snapshot(parent).id for parent in options.parents],
        "recipe": plan.recipe.resolved(),
        "seeds": {"held_out": plan.recipe.held_out.seed},
        "models": plan.models,
        "numerics": plan.numerics,
        "cuts": judged["cuts"],
        "held_out": judged["held_out"],
        "columns": _columns(plan),
        "inputs": [
            {"digest": digest, "rows": rows, "kept": kept}
            for digest, rows, kept in zip(plan.digests, judged["rows"], judged["kept"], strict=True)
        ],
        "funnel": judged["funnel"],
        "against": plan.held.to_json(),
        "code_version": _code_version(),
    }
    provenance = {
        "started": started,
        "finished": _now(),
        "host": socket.gethostname(),
        "command": options.command,
        "engine": {"name": engine.name, "workers": engine.workers},
        "models": list(plan.context.models),
        "stages": stage_facts(plan),
        "reader": READER_VERSION,
        "parents": [open_snapshot(parent).folder.url for parent in options.parents],
        "inputs": [
            {"digest": digest, "name": shard.name, "address": shard.address, "shard": shard.to_json()}
            for digest, shard in zip(plan.digests, plan.shards, strict=True)
        ],
        "units": [dict(shard.units) for shard in measured.shards],
    }
    snapshot = write_snapshot(store, manifest, provenance, packed)
    if options.report:
        write_report(snapshot)
    _produced(run, snapshot, plan, options)
    return snapshot


def _columns(plan: Plan) -> list[dict[str, Any]]:
    digests = {name: model["digest"] for name, model in plan.models.items()}
    return ledger_columns(list(plan.recipe.stages.items()), digests, list(plan.recipe.rules.items()))


def _judge(plan: Plan, measured: Measured, store: Folder, engine: Engine, options: Options) -> dict[str, Any]:
    """Final verdicts as a unit of work of their own; raises RecipeError where rows were never measured."""
    parents = [open_snapshot(parent) for parent in options.parents]
    key = digest_of(
        "judge",
        [[name, rule.type, rule.version, rule.options()] for name, rule in plan.recipe.rules.items()],
        [[shard.digest, shard.dataset, list(shard.units.items())] for shard in measured.shards],
        asdict(plan.recipe.held_out),
        sorted(parent.id for parent in parents),
        plan.held.to_json(),
    )
    done = f"units/verdicts/{key}.json"
    paths = [f"units/verdicts/{key}-{place:06d}.parquet" for place in range(len(measured.shards))]
    if not store.exists(done):
        with Progress("judge", len(plan.recipe.rules), unit="rules", quiet=options.quiet) as progress:
            near = _near(engine, plan.shards)
            case = _case(plan, measured.shards, dict(plan.recipe.rules), list(plan.recipe.stages))
            addresses = [parent.folder.url for parent in parents]
            try:
                result = judge_all(near, store, case, plan.recipe.held_out, addresses, paths)
            except NotMeasuredError as problem:
                raise NeedsMeasuringError(plan, problem.missing) from None
            progress.advance(len(plan.recipe.rules))
        store.write_json(done, result)
        store.delete(JUDGING)
    return {**store.read_json(done), "paths": paths}


class NeedsMeasuringError(RecipeError):
    """A selection that would keep rows no costly stage has looked at."""

    def __init__(self, plan: Plan, missing: Mapping[str, int]) -> None:
        listed = ", ".join(
            f"{rows:,} rows by {name} (about {rows * plan.recipe.stages[name].cpu_ms_per_row / 1000:.0f} s of one core)"
            for name, rows in missing.items()
        )
        super().__init__(
            f"these rules revive rows that were never measured: {listed}; "
            "choose rules that leave them out, or add --measure-missing"
        )


def _pack(
    plan: Plan, measured: Measured, judged: Mapping[str, Any], store: Folder, engine: Engine, options: Options
) -> list[dict[str, Any]]:
    run = plan.recipe.pack.input_shards

    def stage_of(kind: str) -> str | None:
        return next((name for name, stage in plan.recipe.stages.items() if stage.type == kind), None)

    config = {
        "store": store.url,
        "columns": _columns(plan),
        "clip": stage_of("clip_score"),
        "caption_scores": stage_of("caption_scores"),
        "guards": [name for name, rule in plan.recipe.rules.items() if rule.guards],
        "shard_samples": plan.recipe.pack.shard_samples,
        "shard_bytes": plan.recipe.pack.shard_bytes,
        "captioners": captioners(plan.recipe.stages, plan.models),
    }
    tasks, records = [], []
    for group, first in enumerate(range(0, len(plan.shards), run)):
        places = range(first, min(first + run, len(plan.shards)))
        described = [
            {
                "shard": plan.shards[place].to_json(),
                "digest": plan.digests[place],
                "dataset": plan.shards[place].dataset,
                "rows": measured.shards[place].rows,
                "units": dict(measured.shards[place].units),
                "verdicts": judged["paths"][place],
                "count": judged["rows"][place],
            }
            for place in places
        ]
        identity = [
            [item["digest"], item["dataset"], list(item["units"].items()), judged["digests"][place]]
            for item, place in zip(described, places, strict=True)
        ]
        key = digest_of(
            "pack", PACKING_VERSION, group, [value for name, value in config.items() if name != "store"], identity
        )
        records.append(f"units/packed/{key}.json")
        tasks.append({"group": group, "shards": described})
    todo = [(task, record) for task, record in zip(tasks, records, strict=True) if not store.exists(record)]
    by_group = {task["group"]: record for task, record in todo}
    if todo:
        with Progress("pack", len(todo), quiet=options.quiet) as progress:
            for result in _near(engine, plan.shards).map(PackWorker, config, [task for task, _ in todo]):
                store.write_json(by_group[result["group"]], result)
                rows = sum(file["rows"] for path, file in result["files"].items() if path.startswith("ledger/"))
                progress.advance(rows=rows)
    return [store.read_json(record) for record in records]


# --- selecting again -------------------------------------------------------------------------------------------------


def select(source: Snapshot, recipe: Recipe, options: Options, measure_missing: bool = False) -> Snapshot:
    """Judge the rows of `source` again by `recipe`'s rules, from what is measured; no model is opened.

    Raises NeedsMeasuringError where rows would be kept that a gate once left unmeasured (unless `measure_missing`).
    """
    started = _now()
    provenance = source.provenance()
    shards = [InputShard.from_json(item["shard"]) for item in provenance["inputs"]]
    digests = [item["digest"] for item in source.manifest["inputs"]]
    store = source.store
    options = replace(options, output=store.url, models=(*options.models, *provenance["models"]))
    with lease(store, options.command or "sluice select"), open_engine(options.engine, options.workers) as engine:
        known = None if measure_missing else (source.manifest["models"], source.manifest["numerics"])
        plan = make_plan(recipe, shards, digests, context_of(recipe, options), known)
        # Rows are held against what they were held against when the snapshot was made: the files lie in the store.
        plan.held = Held.from_json(source.manifest.get("against", {}))
        with _recorded("select", plan, store, options) as run:
            if measure_missing:
                measured = measure(plan, store, engine, options)
            else:
                _check_units(store, plan, provenance["units"])
                measured = Measured(_judged_shards(plan, provenance["units"]))
            return _finish(plan, measured, store, engine, options, started, run)


def _check_units(store: Folder, plan: Plan, units: Sequence[Mapping[str, str]]) -> None:
    if count_missing(store, [plan.rows_path(digest) for digest in plan.digests]):
        raise RecipeError(
            f"{store.url} was read by another version of Sluice's readers: run sluice curate again, which reads it "
            "anew, and select from that snapshot"
        )
    missing = count_missing(store, [path for mine in units for path in mine.values()])
    if missing:
        raise RecipeError(f"{store.url} has lost {missing} of its measured units; run sluice curate again")


# --- beside the data -------------------------------------------------------------------------------------------------


def write_report(snapshot: Snapshot) -> None:
    """report.html beside the manifest (made once: it is a view of files that never change)."""
    if snapshot.folder.exists("report.html"):
        return
    from pipelines.report.pages import snapshot_page

    snapshot.folder.write("report.html", snapshot_page(snapshot.folder.url))


@contextlib.contextmanager
def _recorded(kind: str, plan: Plan, store: Folder, options: Options) -> Iterator[Run]:
    """Tell the catalog what this run reads: raw shards, weights and parents. The same command again is the same run."""
    from pipelines.lineage.record import Artifact, record_run

    parents = [open_snapshot(parent) for parent in options.parents]
    recipe = plan.recipe.resolved()
    held_by, _ = split_addresses(options.against)
    told = [[parent.id for parent in parents], *([plan.held.to_json()] if options.against else [])]
    run_id = digest_of("run", kind, store.url, list(recipe.items()), plan.digests, *told)
    with record_run(
        options.catalog,
        kind=kind,
        name=Path(options.output).name,
        config=recipe,
        seeds={"held_out": plan.recipe.held_out.seed},
        run_id=run_id,
    ) as run:
        run.consume_many(
            Artifact("raw_shard", digest, shard.address, shard.name)
            for digest, shard in zip(plan.digests, plan.shards, strict=True)
        )
        run.consume_many(
            # The same weights behind two stages are one artifact, named after both.
            Artifact("weights", model["digest"], "", ", ".join(_sharing(model, plan)), {"files": model["files"]})
            for model in plan.models.values()
        )
        run.consume_many(
            Artifact("snapshot", parent.id, parent.folder.url, Path(parent.store.url).name)
            for parent in (*parents, *held_by)
        )
        yield run


def _sharing(model: Mapping[str, Any], plan: Plan) -> list[str]:
    return [stage for stage, other in plan.models.items() if other["digest"] == model["digest"]]


def _produced(run: Run, snapshot: Snapshot, plan: Plan, options: Options) -> None:
    """Tell the catalog what came out, and how many rows the raw shards turned out to hold."""
    from pipelines.lineage.record import Artifact

    run.consume_many(
        Artifact("raw_shard", digest, shard.address, shard.name, {"rows": item["rows"]})
        for digest, shard, item in zip(plan.digests, plan.shards, snapshot.manifest["inputs"], strict=True)
    )
    funnel, held_out = snapshot.manifest["funnel"], snapshot.manifest["held_out"]
    facts = {"rows_in": funnel["rows_in"], "kept": funnel["kept"], "held_out": held_out["rows"]}
    run.produce(Artifact("snapshot", snapshot.id, snapshot.folder.url, Path(options.output).name, facts))


def describe_plan(plan: Plan, store: Folder) -> str:
    """The plan for people: passes, finished units, rows and a cost estimate."""
    known_rows = [
        read_columns(store, plan.rows_path(digest), ["index"]).num_rows
        for digest in plan.digests
        if store.exists(plan.rows_path(digest))
    ]
    size = sum(shard.size_bytes for shard in plan.shards)
    rows = round(sum(known_rows) / len(known_rows) * len(plan.shards)) if known_rows else None
    lines = [
        f"input     {len(plan.shards):,} shards, {size / 1e6:,.1f} MB"
        + (f", about {rows:,} rows" if rows is not None else ", rows unknown until read"),
        f"output    {store.url}",
    ]
    for part in plan.passes:
        after = list(plan.recipe.rules)[: part.rules_before]
        where = f" on rows that pass {', '.join(after)}" if after else ""
        lines.append(f"pass      {'model' if part.is_model else 'cheap'} stages{where}")
        for job in part.jobs:
            if part.rules_before:
                state = "units are known once the rules before it are judged"
            else:
                missing = count_missing(store, [plan.unit_path(job.name, digest) for digest in plan.digests])
                state = f"{len(plan.digests) - missing:,} units finished, {missing:,} to do"
                if rows and missing:
                    seconds = rows * missing / len(plan.digests) * job.stage.cpu_ms_per_row / 1000
                    state += f", estimate {seconds:,.0f} CPU seconds"
            adds = ", ".join(f"{job.name}.{column.name}" for column in job.columns)
            lines.append(f"  {job.name:12s} {adds}: {state}")
            if cost := job.stage.estimate(plan.context, rows):
                lines.append(f"  {job.name}: {cost}")
    lines.append("judge     " + (" > ".join(plan.recipe.rules) or "no rules: every row that opens is kept"))
    for name, model in plan.models.items():
        lines.append(f"weights   {name}: {', '.join(model['files'])} (digest {model['digest'][:12]})")
    lines += told(changes(plan, store), plan)
    groups = -(-len(plan.shards) // plan.recipe.pack.input_shards)
    pack = plan.recipe.pack
    lines.append(f"pack      {groups:,} runs of {pack.input_shards} input shards, {_bounds(pack)}")
    lines += [f"warning   {warning}" for warning in scale_warnings(plan, store)]
    return "\n".join(lines)


def _bounds(pack: Pack) -> str:
    samples = f"{pack.shard_samples:,} samples" if pack.shard_samples else ""
    size = f"{pack.shard_bytes:,} image bytes" if pack.shard_bytes else ""
    most = " and ".join(filter(None, (samples, size)))
    return f"tars of at most {most}" if most else "one tar each"


def _code_version() -> str:
    from pipelines.lineage.record import code_version

    return code_version()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command_line() -> str:
    return " ".join(["sluice", *sys.argv[1:]])
