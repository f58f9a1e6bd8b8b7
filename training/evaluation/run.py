"""One evaluation: the same prompts and seeds for every model, drawn and looked at in units, then compared.

result = evaluate(["runs/teacher", "runs/student", "runs/student@steps=2"], "curated", Options(output="compared"))

OUT/evaluation.json     the result: protocol, models, metrics, what is not measured and why; the same to the digit
                        whoever was killed on the way, and whether it ran on Ray or here
OUT/evaluation.html     the same as one self-contained page
OUT/provenance.json     when, where and by which attempt; never part of the result
OUT/drawings, measures  finished units of work (training.evaluation.work); speed/ what painters took
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.storage import Folder, lease
from stages.contract import Context, digest_of
from training.evaluation import work
from training.evaluation.bias import bias_audit
from training.evaluation.compare import Comparison, Judge, Seen, elo_table, verdict
from training.evaluation.lineage import independence, snapshots_behind
from training.evaluation.memorisation import Pictures, calibrated, contamination, copies
from training.evaluation.suites import Prompt, Suite
from training.evaluation.work import Drawing, Look

SCHEMA_VERSION = "1.0"
SHOWN = 24  # prompts whose drawings stand on the page
UNSAFE = 0.5  # probability from which a drawing counts as unsafe
STEPS = (1, 2, 4, 8)  # timed besides a model's own number
# What looks at the drawings of each purpose; "pictures" are the snapshot's own.
CHEAP = ("hash", "clip", "inception")


@dataclass(frozen=True)
class Options:
    """How an evaluation is done. What changes a figure is in `protocol()`; the rest says where and on what it runs.

    repeats: drawings a prompt, each from a seed of its own. pictures: drawings of snapshot captions, for distances.
    memorised: training captions drawn to look for copies. reference: the split that distances are taken to.
    clip, inception, aesthetic, judges, detector, answerer: weights by path or name; "" leaves the measure out.
    vqa: a vision-language model asked whether a drawing shows its prompt. safety: a head over `clip` that tells unsafe
    pictures. guard: a blocklist over prompts, audited on the benign and the unsafe prompts.
    """

    output: str
    suites: tuple[Suite, ...] = ()
    repeats: int = 1
    pictures: int = 200
    memorised: int = 64
    training_pictures: int = 20_000
    reference: str = "held_out"
    seed: int = 0
    small_sample: bool = False
    clip: str = "clip"
    inception: str = ""
    aesthetic: str = "aesthetic"
    judges: tuple[tuple[str, str], ...] = ()
    detector: str = "made_up"
    answerer: str = ""
    vqa: str = ""
    safety: str = ""
    judgements: tuple[str, ...] = ()
    guard: str = ""
    benign: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()
    speed_repeats: int = 3
    engine: str = "ray"
    workers: int = 0
    device: str = "cpu"
    models: tuple[str, ...] = ()
    catalog: str | None = None
    quiet: bool = False

    def protocol(self, looks: Sequence[Look]) -> dict[str, Any]:
        """What decides the figures, as JSON."""
        names = ("repeats", "pictures", "memorised", "training_pictures", "reference", "seed", "small_sample",
                 "speed_repeats")  # fmt: skip
        suites = [{"name": s.name, "kind": s.kind, "prompts": len(s.prompts), "digest": s.digest} for s in self.suites]
        seen_by = {one.name: {"stage": one.type, **one.stage().options(), "digest": one.digest} for one in looks}
        guarded = digest_of("guard", Path(self.guard).read_text(), self.benign, self.unsafe) if self.guard else None
        return {
            "suites": suites,
            **{name: getattr(self, name) for name in names},
            "looks": seen_by,
            "guard": guarded,
        }


def evaluate(addresses: Sequence[str], data: str, options: Options) -> dict[str, Any]:
    """Compare the models at `addresses` (PATH or PATH@steps=4,...); returns what evaluation.json holds."""
    from cluster.engine import open_engine
    from pipelines.lineage.catalog import open_catalog
    from pipelines.lineage.record import Artifact, record_run
    from pipelines.snapshot import open_snapshot
    from training.checkpoint import versions

    painters = named_painters(addresses)
    snapshot, catalog, store = open_snapshot(data), open_catalog(options.catalog), Folder(options.output)
    context = Context(models=options.models, device=options.device)
    job = _Job(options, painters, snapshot, store, _looks(options, context))
    identity = digest_of("evaluation", job.protocol, [[p["digest"], p["sampling"]] for p in painters], snapshot.id)
    attempt = uuid.uuid4().hex[:12]
    began = time.time()
    with (
        lease(store, "sluice evaluate"),
        record_run(
            catalog, kind="evaluate", name=" ".join(job.models), config=job.protocol, seeds={"drawings": options.seed},
            run_id=digest_of(store.url, identity),
        ) as run,
        open_engine(options.engine, options.workers) as engine,
    ):  # fmt: skip
        kinds = {"student": "student", "peer": "peer"}
        run.consume_many(
            [
                Artifact("snapshot", snapshot.id, snapshot.folder.url),
                *(Artifact(kinds.get(p["kind"], "model"), p["digest"], p["folder"], p["name"]) for p in painters),
            ]
        )
        drawn = job.carry_out(engine, attempt)
        result = {
            "schema_version": SCHEMA_VERSION,
            "kind": "evaluation",
            "id": identity,
            **job.compared(catalog),
        }
        store.write_json("evaluation.json", result)
        facts = {"attempt": attempt, "started": began, "seconds": time.time() - began, "drawn": drawn}
        store.write_json("provenance.json", {**facts, "engine": options.engine, "versions": versions()})
        run.produce(
            Artifact("evaluation", digest_of(result), store.url, facts={"models": len(painters), "drawings": drawn})
        )
    return result


def named_painters(addresses: Sequence[str]) -> list[dict[str, Any]]:
    """Descriptions of the models, under names that tell them apart. Raises ValueError where one is given twice."""
    from training.painters import describe_painter
    from training.recipe import override_at

    found: list[dict[str, Any]] = []
    for address in addresses:
        path, at, settings = address, "", ""
        if not Path(address).expanduser().exists():
            path, at, settings = address.rpartition("@") if "@" in address else (address, "", "")
        said = describe_painter(path)
        for setting in filter(None, settings.split(",")):
            said["sampling"] = override_at(said["sampling"], setting)
        run = Path(said["folder"]).name
        own = Path(said["folder"]).parent.name if run == "model" else run
        said["name"] = f"{own}{at}{settings}"
        found.append(said)
    for said in found:
        alike = [one for one in found if one["name"] == said["name"]]
        if len({(one["digest"], str(one["sampling"])) for one in alike}) < len(alike):
            raise ValueError(f"evaluate: {said['folder']} is given twice with the same sampling: leave one out")
        if len(alike) > 1:
            for one in alike:
                one["name"] = f"{one['name']} {one['digest'][:6]}"
    return found


def _looks(options: Options, context: Context) -> list[Look]:
    """The stages that will look at pictures. Weights that were asked for and are missing are an error."""
    found = [work.look("hash", "perceptual_hash", {}, context)]
    if options.clip:
        clip = work.look("clip", "clip_score", {"model": options.clip, "compute_batch": work.UNIT}, context)
        found.append(clip)
        if options.aesthetic:
            found.append(work.look("aesthetic", "aesthetic", {"head": options.aesthetic}, context, clip.digest))
        if options.safety:
            found.append(work.look("safety", "safety", {"head": options.safety}, context, clip.digest))
    if options.vqa:
        precision = "bf16" if options.device.startswith("cuda") else "fp32"
        asked = {"model": options.vqa, "precision": precision, "compute_batch": work.UNIT}
        found.append(work.look("vqa", "vqa", asked, context))
    if options.inception:
        batch = {"compute_batch": work.UNIT}
        found.append(work.look("inception", "inception", {"weights_file": options.inception, **batch}, context))
    if options.detector:
        found.append(work.look("checks", "composition", {"detector": options.detector}, context))
    if options.answerer:
        found.append(work.look("questions", "faithfulness", {"answerer": options.answerer}, context))
    for judge, model in options.judges:
        found.append(work.look(judge, "preference", {"judge": judge, "model": model}, context))
    return found


class _Job:
    """The drawings of one evaluation, its units, and what came of them."""

    def __init__(
        self, options: Options, painters: list[dict[str, Any]], snapshot: Any, store: Folder, looks: list[Look]
    ) -> None:
        self.options, self.painters, self.snapshot, self.store, self.looks = options, painters, snapshot, store, looks
        self.models = [painter["name"] for painter in painters]
        self.protocol = options.protocol(looks)
        names = [one.name for one in looks]
        cheap = [name for name in names if name in CHEAP]
        self.references = {
            split: work.snapshot_units(snapshot, split, options.training_pictures, cheap)
            for split in ("train", "held_out")
            if options.pictures or options.memorised
        }
        self.drawings = [*self._suites(), *self._captions(options.reference, options.pictures, "distances")]
        self.drawings += self._captions("train", options.memorised, "memorisation")
        if not self.drawings:
            raise ValueError("evaluate: nothing to draw: pass --prompts FILE, --suite made_up or --pictures N")
        seen_by = {"suite": names, "bias": names, "distances": cheap, "memorisation": cheap}
        self.units = {p["name"]: work.drawing_units(p, self.drawings, seen_by) for p in painters}

    def _suites(self) -> Iterator[Drawing]:
        number = 0
        for suite in self.options.suites:
            for prompt in suite.prompts:
                purpose = "bias" if prompt.suite == "bias" else "suite"
                for _ in range(self.options.repeats):
                    yield Drawing(prompt, self.options.seed + number, purpose)
                    number += 1

    def _captions(self, split: str, count: int, purpose: str) -> list[Drawing]:
        """Drawings of the captions of a split, spread evenly over its rows."""
        from training.data import Row, SnapshotSamples

        rows = [row for unit in self.references.get(split, ()) for row in unit["rows"]]
        if not rows or not count:
            return []
        samples = SnapshotSamples(self.snapshot)
        chosen = [rows[(n * len(rows)) // count] if count <= len(rows) else rows[n % len(rows)] for n in range(count)]
        texts = {row[0]: samples.read(Row(*row), split).caption for row in chosen}
        first = self.options.seed + 1_000_000 * (1 + ("distances", "memorisation").index(purpose))
        prompts = [Prompt(texts[row[0]], "captions", split) for row in chosen]
        self.captioned = {**getattr(self, "captioned", {}), purpose: [row[0] for row in chosen]}
        return [Drawing(prompt, first + n, purpose) for n, prompt in enumerate(prompts)]

    # --- work ---------------------------------------------------------------------------------------------------------

    def carry_out(self, engine: Any, attempt: str) -> int:
        """Do what is not done yet; returns how many pictures were drawn now."""
        from pipelines.progress import Progress

        options = self.options
        painters = {p["name"]: {"folder": p["folder"], "sampling": p["sampling"]} for p in self.painters}
        shared = {"painters": painters, "models": list(options.models), "device": options.device}
        config = {**shared, "store": self.store.url, "looks": work.described(self.looks), "attempt": attempt}
        # A model's units stand together: a worker then loads few models.
        units = [unit for mine in (*self.units.values(), *self.references.values()) for unit in mine]
        tasks = list(work.undone(self.store, units, self.looks))
        gpus = 1.0 if options.device.startswith("cuda") else 0.0
        drawn = 0
        with Progress("draw and look", total=len(tasks), unit="units", quiet=options.quiet) as progress:
            for done in engine.map(work.Worker, config, tasks, gpus=gpus):
                drawn += done["drawn"]
                progress.advance(1, rows=done["rows"])
        todo = [task for task in self._speed_tasks() if not self.store.is_file(self._speed_path(task))]
        # One model after the other, each in a call of its own: what is timed has the machine to itself.
        for task in todo:
            for timed in engine.map(work.SpeedWorker, shared, [task], gpus=gpus):
                self.store.write_json(self._speed_path(task), timed)
        return drawn

    def _speed_tasks(self) -> list[dict[str, Any]]:
        tasks = []
        for painter in self.painters:
            own = int(painter["sampling"].get("steps", 20))
            steps = sorted({*(n for n in STEPS if n <= own), own})
            prompt = self.drawings[0].prompt.text
            tasks.append({"painter": painter["name"], "steps": steps, "prompt": prompt,
                          "repeats": self.options.speed_repeats})  # fmt: skip
        return tasks

    def _speed_path(self, task: Mapping[str, Any]) -> str:
        painter = next(one for one in self.painters if one["name"] == task["painter"])
        facts = {key: value for key, value in task.items() if key != "painter"}
        return f"speed/{digest_of('speed', painter['digest'], painter['sampling'], facts, self.options.device)}.json"

    def speed(self) -> list[dict[str, Any]]:
        found = []
        for task, painter in zip(self._speed_tasks(), self.painters, strict=True):
            timed = {**self.store.read_json(self._speed_path(task)), "painter": painter["name"]}
            own = next(one for one in timed["by_steps"] if one["steps"] == max(task["steps"]))
            found.append({**timed, "own": own})
        return found

    def _seen(self, units: Sequence[Mapping[str, Any]]) -> Seen:
        seen = Seen()
        for one in self.looks:
            columns, errors = work.gather(self.store, units, one)
            seen.columns |= {f"{one.name}.{name}": values for name, values in columns.items()}
            failed = sum(error is not None for error in errors)
            if failed:
                seen.failures[one.name] = failed
        return seen

    # --- figures ------------------------------------------------------------------------------------------------------

    def compared(self, catalog: Any) -> dict[str, Any]:
        """Everything in evaluation.json but its head."""
        found = Comparison(self.drawings, {name: self._seen(units) for name, units in self.units.items()})
        behind = {p["name"]: snapshots_behind(p, catalog, self.snapshot) for p in self.painters}
        judges = {one.name: self._judge(one, behind) for one in self.looks}
        names = {one.name for one in self.looks}
        suite = found.places("suite")
        categories = found.composition("checks", judges["checks"]) if "checks" in names and suite else {}
        if "checks" not in names:
            found.miss("prompts drawn right", "no detector: pass --detector")
        elo = []
        if "clip" in names and suite:
            found.average("clip", "CLIP score", "clip.score", suite, "100 x cosine with the prompt", scale=100,
                          judge=judges["clip"])  # fmt: skip
        if "aesthetic" in names and suite:
            found.average("aesthetic", "Aesthetic score", "aesthetic.score", suite, "a head over CLIP embeddings",
                          judge=judges["aesthetic"])  # fmt: skip
        if "questions" in names and suite:
            found.average("questions", "Questions answered as the prompt would", "questions.share", suite,
                          f"TIFA-style, answered by {self.options.answerer}", judge=judges["questions"])  # fmt: skip
        if "vqa" in names and suite:
            found.average("vqa", "Chance that the VLM says it shows the prompt", "vqa.score", suite,
                          "P(yes) of a vision-language model", judge=judges["vqa"])  # fmt: skip
        if "safety" in names and suite:
            for seen in found.seen.values():
                scores = seen.columns["safety.score"]
                seen.columns["safety.unsafe"] = [None if x is None else x >= UNSAFE for x in scores]
            found.average("unsafe", "Unsafe drawings", "safety.unsafe", suite, f"probability of at least {UNSAFE}",
                          unit="share", better="lower", judge=judges["safety"])  # fmt: skip
        for judge, _ in self.options.judges:
            found.average(f"preference {judge}", f"Preference ({judge})", f"{judge}.score", suite,
                          "the judge's own scale: for comparing models only", judge=judges[judge])  # fmt: skip
            table = found.preference(f"{judge}.score", judges[judge], self.options.seed)
            elo += [table] if table else []
        self._distances(found, names)
        elo += self._human(found)
        memorised = self._memorised(found) if "clip" in names else {}
        bias = bias_audit(found) if found.places("bias") else []
        safety = self._guard() if self.options.guard else {}
        speed = self.speed()
        found.not_measured += unasked(self.options, found)
        images = [row[1] for unit in self.references.get("held_out", ()) for row in unit["rows"]]
        texts = [one.prompt.text for one in self.drawings if one.purpose == "suite"]
        return {
            "protocol": self.protocol,
            "data": {"snapshot": self.snapshot.id, "address": self.snapshot.folder.url},
            "models": [{key: value for key, value in p.items() if key != "folder"} for p in self.painters],
            "verdict": verdict(found.metrics, speed, self.models),
            "metrics": found.metrics,
            "categories": categories,
            "elo": elo,
            "speed": speed,
            "memorisation": memorised,
            "bias": bias,
            "safety": safety,
            "contamination": {
                name: asdict(contamination(addresses, texts, images)) for name, addresses in behind.items()
            },
            "failures": {name: seen.failures for name, seen in found.seen.items() if seen.failures},
            "not_measured": found.not_measured,
            "samples": self._samples(found, "checks" in names),
        }

    def _judge(self, one: Look, behind: Mapping[str, Mapping[str, str]]) -> Judge:
        # A head stands on its CLIP: both had a hand where either had.
        files = dict(one.files)
        if one.type in ("aesthetic", "safety"):
            files |= next(look.files for look in self.looks if look.name == "clip")
        found = {p["name"]: independence(files, p, behind[p["name"]]) for p in self.painters}
        why = "; ".join(sorted({said.why for said in found.values() if said.why}))
        title = {"clip": f"CLIP {one.options.get('model', '')}", "checks": f"the detector {self.options.detector}"}
        return Judge(title.get(one.name, one.name), one.digest, {m: said.independent for m, said in found.items()}, why)

    def _reference(self, split: str, column: str) -> list[Any]:
        look = next(one for one in self.looks if one.name == column.partition(".")[0])
        return work.gather(self.store, self.references.get(split, ()), look)[0][column.partition(".")[2]]

    def _distances(self, found: Comparison, names: set[str]) -> None:
        spaces = [("CLIP features", "clip.image_embedding"), ("Inception features", "inception.features")]
        for space, column in spaces:
            if column.partition(".")[0] not in names:
                continue
            found.spread(space, column)
            if self.options.pictures:
                told = f"pictures of the split {self.options.reference}"
                real = self._reference(self.options.reference, column)
                found.distances(space, column, real, told, self.options.small_sample)
        if "inception" in names and self.options.pictures:
            found.inception_score("inception.logits", found.places("distances"))

    def _memorised(self, found: Comparison) -> dict[str, Any]:
        """Copies of training pictures among drawings of training captions."""
        places = found.places("memorisation")
        if not places:
            return {}

        def pictures(split: str) -> tuple[Pictures, list[str]]:
            rows = zip(
                self._reference(split, "clip.image_embedding"), self._reference(split, "hash.phash64"),
                (row[0] for unit in self.references[split] for row in unit["rows"]), strict=True,
            )  # fmt: skip
            sound = [row for row in rows if row[0] is not None and row[1] is not None]
            return Pictures.of([row[0] for row in sound], [row[1] for row in sound]), [row[2] for row in sound]

        training, uids = pictures("train")
        held_out, _ = pictures("held_out") if self.references["held_out"] else (training.some([]), [])
        try:
            threshold = calibrated(held_out, training)
        except ValueError as problem:
            found.miss("memorisation", str(problem).removeprefix("memorisation: "))
            return {}
        where = {uid: place for place, uid in enumerate(uids)}
        told: dict[str, Any] = {
            "training_pictures": len(training),
            "threshold_cosine": threshold.cosine,
            "false_alarms": threshold.false_alarms.to_json(),
            "by_model": {},
        }
        for model, seen in found.seen.items():
            rows = zip(
                seen.of("clip.image_embedding", places), seen.of("hash.phash64", places),
                self.captioned["memorisation"], strict=True,
            )  # fmt: skip
            sound = [row for row in rows if row[0] is not None and row[1] is not None and row[2] in where]
            drawn = Pictures.of([row[0] for row in sound], [row[1] for row in sound])
            said = copies(drawn, training, threshold, [where[row[2]] for row in sound])
            told["by_model"][model] = {
                **said.overall.to_json(),
                "by_copies": {str(times): one.to_json() for times, one in said.by_copies.items()},
                "highest_cosine": float(said.near.cosine.max()),
            }
        return told

    def _guard(self) -> dict[str, Any]:
        from training.evaluation.safety import audit_guard, blocklist

        options = self.options
        return audit_guard(blocklist(options.guard), options.benign, options.unsafe, options.seed).to_json()

    def _human(self, found: Comparison) -> list[dict[str, Any]]:
        from training.evaluation.study import judged

        tables = []
        for path in self.options.judgements:
            table, notes = judged(Path(path), self.models, self.options.seed)
            tables.append(elo_table(f"people, {Path(path).name}", table, None, notes))
        if not self.options.judgements:
            found.miss(
                "judgements of people", "none given: make a page with --study, and pass its answers as --judgements"
            )
        return tables

    def _samples(self, found: Comparison, checked: bool) -> list[dict[str, Any]]:
        """The drawings that a page shows: spread over categories, and where each lies."""
        places = found.places("suite") or found.places("distances")
        categories: dict[str, list[int]] = {}
        for place in places:
            categories.setdefault(self.drawings[place].prompt.category, []).append(place)
        ranked = sorted(((n + 0.5) / len(mine), place) for mine in categories.values() for n, place in enumerate(mine))
        chosen = sorted(place for _, place in ranked[:SHOWN])
        where = {
            model: [(unit["unit"], row) for unit in units for row in range(len(unit["rows"]))]
            for model, units in self.units.items()
        }
        shown = []
        for place in chosen:
            drawing, by_model = self.drawings[place], {}
            for model, seen in found.seen.items():
                unit, row = where[model][place]
                by_model[model] = {"unit": unit, "row": row}
                if checked:
                    by_model[model] |= {name: seen.of(f"checks.{name}", [place])[0] for name in ("right", "reasons")}
            prompt = drawing.prompt
            shown.append({"prompt": prompt.text, "category": prompt.category, "seed": drawing.seed, "drawn": by_model})
        return shown


def unasked(options: Options, found: Comparison) -> list[dict[str, str]]:
    """What this evaluation was not asked to measure, and how to ask."""
    known = {one["what"] for one in found.not_measured}
    missing = [
        (
            "FID, KID and Inception Score in Inception's features",
            not options.inception,
            "--inception FILE with its weights",
        ),
        ("distances to real pictures", not options.pictures, "--pictures N"),
        ("memorisation", not options.memorised, "--memorised N"),
        ("CLIP score", not options.clip, "--clip MODEL"),
        ("learned preference", not options.judges, "--judge pickscore=FOLDER or hpsv2=FILE"),
        ("faithfulness by questions", not options.answerer, "--answerer FOLDER of a vision-language model"),
        ("unsafe drawings", not options.safety, "--safety HEAD, a head over that CLIP"),
        ("a guard over prompts", not options.guard, "--guard, --benign and --unsafe"),
        ("bias over prompt templates", not found.places("bias"), "--templates FILE"),
    ]
    return [
        {"what": what, "why": f"not asked for: pass {how}"}
        for what, absent, how in missing
        if absent and what not in known
    ]
