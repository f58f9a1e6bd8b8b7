"""Judging carried out: pieces and barriers as units of work on an engine, and what comes of them.

Shards are taken in pieces, runs of consecutive ones. A task takes one piece up to the next barrier and leaves its
verdicts so far and, for the barrier, the small columns of its rows still alive; the barrier's tasks follow
(pipelines.barriers); then the pieces go on with its answers. Every task leaves files named by what went into it, and a
record last, under units/judge/ of the store: a judging that was killed goes on where it stood, and a task that runs
twice leaves what one run leaves. The same tasks run on Ray or one after the other in this process.

The driver holds a few numbers a piece. What one task still holds alone, and grows with the data: the confirmed links
of near-duplicates and the chain of keepers of rows dropped as duplicates (16 to 60 bytes each), all alive rows of a
barrier that is not separable, and the parents' sides of the held-out split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.engine import Engine
from cluster.storage import Folder
from pipelines import barriers
from pipelines.judge import (
    JUDGE_VERSION,
    VERDICT_SCHEMA,
    Answer,
    JudgedShard,
    Judgement,
    NotMeasuredError,
    advance,
    check_balance,
    drawn_side,
    gather_columns,
    roots_of,
)
from pipelines.measure import arrow_type, write_table
from pipelines.recipe import HeldOut
from pipelines.snapshot import open_snapshot
from stages.contract import digest_of
from stages.rules import OCCURRENCE, Rule

FOLDER = "units/judge"
MOST_PIECES = 1024
SIDES = (None, "train", "held_out")


@dataclass(frozen=True)
class Case:
    """What is to be judged.

    stages: those that have measured, in recipe order. rules_before: for each stage, how many rules a row must pass
    before it is looked at. held: Parquet files in the store with rows of earlier snapshots that duplicates are dropped
    for: the columns that duplicate rules need, under their names here, and uid and index. benchmarks: the same for
    rules on contamination. The names say in reasons where such a row lies.
    """

    shards: tuple[JudgedShard, ...]
    rules: Mapping[str, Rule]
    stages: tuple[str, ...]
    rules_before: Mapping[str, int]
    held: tuple[str, ...] = ()
    held_names: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    benchmark_names: tuple[str, ...] = ()

    def held_for(self, rule: Rule) -> tuple[str, ...]:
        return self.benchmarks if rule.takes_benchmarks else self.held if rule.takes_held else ()

    def name_of_held(self, rule: Rule, number: int) -> str:
        names = self.benchmark_names if rule.takes_benchmarks else self.held_names
        return names[number] if number < len(names) else ""

    def pieces(self) -> list[tuple[JudgedShard, ...]]:
        size = max(1, -(-len(self.shards) // MOST_PIECES))
        return [self.shards[first : first + size] for first in range(0, len(self.shards), size)]

    def key(self, position: int) -> str:
        """Digest of everything that decides the rows' fate before the rule at `position` has answered."""
        rules = list(self.rules.items())[: position + 1]
        counted = [stage for stage in self.stages if self.rules_before.get(stage, 0) <= position]
        return digest_of(
            "judge",
            JUDGE_VERSION,
            position,
            [[name, rule.type, rule.version, rule.options()] for name, rule in rules],
            [[shard.digest, shard.dataset, [shard.units[stage] for stage in counted]] for shard in self.shards],
            [list(self.held), list(self.held_names)],
            [list(self.benchmarks), list(self.benchmark_names)],
        )


@dataclass(frozen=True)
class Judged:
    """Where the last states of all pieces lie, and what was counted on the way."""

    base: str
    counts: list[int]
    funnel: dict[str, Any]
    cuts: dict[str, Any]


def judge_gate(engine: Engine, store: Folder, case: Case, paths: Sequence[str]) -> list[str]:
    """Which rows the next stages may look at: writes one gate file a shard to `paths`, returns their digests."""
    run = _runner(engine, store, case)
    judged = _take_through(case, run)
    written = _each_piece(case, run, "gate", judged.base, paths, {})
    return [digest for result in written for digest in result["digests"]]


def judge_all(
    engine: Engine, store: Folder, case: Case, held_out: HeldOut, parents: Sequence[str], paths: Sequence[str]
) -> dict[str, Any]:
    """The final verdicts: writes one verdict file a shard to `paths`; returns funnel, cuts, split and file digests.

    parents: snapshots whose sides of the held-out split are inherited. Raises NotMeasuredError where a rule needs rows
    that no stage has measured.
    """
    run = _runner(engine, store, case)
    judged = _take_through(case, run)
    # The split depends on more than the rules: on the seed, the fraction and the parents.
    split = {"held_out": asdict(held_out), "parents": [open_snapshot(parent).folder.url for parent in parents]}
    split["key"] = digest_of("split", split["held_out"], sorted(open_snapshot(parent).id for parent in parents))
    groups = {"do": "groups", "base": judged.base, "pieces": len(case.pieces()), **split}
    run([{**groups, "done": f"{judged.base}/groups-{split['key']}.json"}])
    written = _each_piece(case, run, "verdicts", judged.base, paths, split)
    rows = sum(result["held_out"] for result in written)
    return {
        "funnel": judged.funnel,
        "cuts": judged.cuts,
        # Every group has one row that is kept, so held-out rows and groups are as many.
        "held_out": {
            "fraction": held_out.fraction,
            "rows": rows,
            "groups": rows,
            "inherited": sum(result["inherited"] for result in written),
        },
        "digests": [digest for result in written for digest in result["digests"]],
        "rows": judged.counts,
        "kept": [kept for result in written for kept in result["kept"]],
    }


# --- the driver's side -----------------------------------------------------------------------------------------------


def _runner(engine: Engine, store: Folder, case: Case) -> barriers.Runner:
    """A function that has tasks done, those with a record excepted, and returns their results in order."""
    # Shards travel in tasks, a piece at a time.
    config = {"store": store.url, "case": replace(case, shards=())}

    def run(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        left = []
        for task in tasks:
            if store.exists(task["done"]):
                results[task["done"]] = store.read_json(task["done"])
            else:
                left.append(task)
        for result in engine.map(JudgeWorker, config, left):
            results[result["done"]] = result
        return [results[task["done"]] for task in tasks]

    return run


def _take_through(case: Case, run: barriers.Runner) -> Judged:
    rules = list(case.rules.items())
    pieces = case.pieces()
    ranks = {digest: rank for rank, digest in enumerate(sorted(shard.digest for shard in case.shards))}
    steps = np.zeros((len(rules), 3), np.int64)
    cuts: dict[str, Any] = {}
    first, base = 0, ""
    answers: list[str] = []
    while True:
        start = first + 1 if base else 0
        position = next((p for p in range(start, len(rules)) if rules[p][1].barrier), len(rules))
        before, base = base, f"{FOLDER}/{case.key(position)}"
        results = run(
            [
                {
                    "do": "advance",
                    "done": f"{base}/state-{number:06d}.json",
                    "piece": number,
                    "shards": [asdict(shard) for shard in piece],
                    "ranks": [ranks[shard.digest] for shard in piece],
                    "first": first,
                    "position": position,
                    "before": before,
                    "base": base,
                    "answers": answers,
                    "pieces": len(pieces),
                }
                for number, piece in enumerate(pieces)
            ]
        )
        _refuse_unmeasured(results)
        for result in results:
            for at, *counted in result["steps"]:
                steps[at] += counted
        if position == len(rules):
            counts = [rows for result in results for rows in result["counts"]]
            return Judged(base, counts, _funnel(rules, steps, results), cuts)
        name, rule = rules[position]
        rows = [result["alive"] for result in results]
        if files := case.held_for(rule):
            held = [
                {
                    "do": "hold",
                    "done": f"{base}/held-{number:06d}.json",
                    "path": path,
                    "position": position,
                    "target": f"{base}/alive-{len(pieces) + number:06d}.arrow",
                }
                for number, path in enumerate(files)
            ]
            rows += [result["rows"] for result in run(held)]
        answered = barriers.run_barrier(rule, position, base, rows, len(pieces), run)
        if answered["cut"] is not None:
            cuts[name] = answered["cut"]
        first, answers = position, answered["paths"]


def _refuse_unmeasured(results: Iterable[Mapping[str, Any]]) -> None:
    """Raises NotMeasuredError for the first rule that needs what was not measured: later ones have seen too much."""
    found = [result["missing"] for result in results if result["missing"]]
    if found:
        earliest = min(position for position, _ in found)
        missing: Counter[str] = Counter()
        for position, by_stage in found:
            if position == earliest:
                missing.update(by_stage)
        raise NotMeasuredError(dict(sorted(missing.items())))


def _funnel(
    rules: Sequence[tuple[str, Rule]], steps: np.ndarray, results: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    verdicts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for result in results:
        verdicts.update(result["verdicts"])
        failures.update(result["failures"])
    funnel = {
        "rows_in": sum(rows for result in results for rows in result["counts"]),
        "failed": verdicts["failed"],
        "rejected": verdicts["rejected"],
        "kept": verdicts["kept"],
        "failures": dict(sorted(failures.items())),
        "steps": [
            {
                "rule": name,
                "type": rule.type,
                "column": rule.needs[0],
                "threshold": rule.threshold_text(),
                "in": rows_in,
                "rejected": rejected,
                "failed": failed,
                "out": rows_in - rejected - failed,
            }
            for (name, rule), (rows_in, rejected, failed) in zip(rules, steps.tolist(), strict=True)
        ],
    }
    check_balance(funnel)
    return funnel


def _each_piece(
    case: Case, run: barriers.Runner, do: str, base: str, paths: Sequence[str], more: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Have a task done for each piece that writes its shards' files."""
    tasks, first = [], 0
    for number, piece in enumerate(case.pieces()):
        mine = list(paths[first : first + len(piece)])
        first += len(piece)
        done = f"{base}/{do}-{digest_of(mine)}.json"
        shards = [asdict(shard) for shard in piece]
        tasks.append({"do": do, "done": done, "piece": number, "shards": shards, "base": base, "paths": mine, **more})
    return run(tasks)


# --- the workers' side -----------------------------------------------------------------------------------------------


class JudgeWorker:
    """Does one task after another; a task's record is written last."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.store = Folder(config["store"])
        self.case: Case = config["case"]
        self.rules = list(self.case.rules.items())
        self.inherited: dict[tuple[str, ...], dict[str, str]] = {}
        self.own: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "advance": self.advance,
            "hold": self.hold,
            "groups": self.groups,
            "gate": self.gate,
            "verdicts": self.verdicts,
        }

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        if task["do"] in self.own:
            result = self.own[task["do"]](task)
        else:
            result = barriers.TASKS[task["do"]](self.store, self.rules[task["position"]][1], task)
        result["done"] = task["done"]
        self.store.write_json(task["done"], result)
        return result

    def advance(self, task: dict[str, Any]) -> dict[str, Any]:
        """Take a piece from one barrier to the next."""
        first, position = task["first"], task["position"]
        here = dict(self.rules[first : position + 1])
        shards = [JudgedShard(**shard) for shard in task["shards"]]
        columns, errors, counts = gather_columns(self.store, shards, here, self.case.stages)
        # A shard is told by its rank: as good as its digest to order rows, and an eighth of its size.
        columns["shard"] = pa.chunked_array([np.repeat(np.array(task["ranks"], np.int32), counts)])
        state, answer = f"state-{task['piece']:06d}.arrow", None
        judged = Judgement.begin(sum(counts))
        if task["before"]:
            judged = Judgement.from_table(barriers.read_batch(self.store, f"{task['before']}/{state}", 0))
            answer = barriers.answer_for(self.store, task["answers"], task["piece"])
            self._say_where(answer, self.rules[first][1], task["pieces"])
        done = advance(judged, self.rules, columns, errors, self.case.rules_before, first, answer)
        table = judged.to_table().append_column("image_id", columns["image_id"])
        barriers.write_batches(self.store, f"{task['base']}/{state}", table.schema, [table])
        alive = judged.alive
        if position < len(self.rules) and not done.missing:
            rule = self.rules[position][1]
            mark = False if self.case.held_for(rule) else None
            rows = barriers.alive_table(columns, rule.needs, alive, mark)
            barriers.write_batches(self.store, f"{task['base']}/alive-{task['piece']:06d}.arrow", rows.schema, [rows])
        return {
            "counts": counts,
            "alive": int(alive.sum()),
            "missing": done.missing,
            "steps": [[at, step["rows_in"], step["rejected"], step["failed"]] for at, step in done.steps.items()],
            "verdicts": dict(Counter(judged.verdict.tolist())),
            "failures": dict(
                Counter(
                    f"{judged.stage[row]}: {judged.reason[row]}" for row in np.flatnonzero(judged.verdict == "failed")
                )
            ),
        }

    def _say_where(self, answer: Answer, rule: Rule, pieces: int) -> None:
        """Add to the reason of a row whose keeper is held already what holds it."""
        for place, keeper in enumerate(answer.keeper.tolist()):
            number = (keeper >> barriers.PIECE_SHIFT) - pieces
            if keeper >= 0 and number >= 0 and (name := self.case.name_of_held(rule, number)):
                answer.reason[place] = f"{answer.reason[place]}, in {name}"

    def hold(self, task: dict[str, Any]) -> dict[str, Any]:
        """Rows of an earlier snapshot as a barrier is given them."""
        needs = sorted({*self.rules[task["position"]][1].needs, *OCCURRENCE})
        # Ranks begin at 0: a held row comes before all others whatever its shard is called.
        wanted = [name for name in needs if name != "shard"]
        table = pq.read_table(self.store.open(task["path"]), columns=wanted)
        columns = {name: table[name] for name in wanted}
        columns["shard"] = pa.chunked_array([np.full(table.num_rows, -1, np.int32)])
        rows = barriers.alive_table(columns, needs, np.ones(table.num_rows, bool), True)
        barriers.write_batches(self.store, task["target"], rows.schema, [rows])
        return {"rows": rows.num_rows}

    def _states(self, task: dict[str, Any], columns: Sequence[str]) -> Iterable[tuple[int, pa.Table]]:
        for piece in range(task["pieces"]):
            yield piece, barriers.read_batch(self.store, f"{task['base']}/state-{piece:06d}.arrow", 0, columns)

    def groups(self, task: dict[str, Any]) -> dict[str, Any]:
        """The side of every row in a group of duplicates whose keeper is kept.

        A group is a kept row and every row dropped for it, directly or through its keeper's keeper. A side is inherited
        from parents by any row's image, held-out winning; else it is drawn for the kept row's image.
        """
        inherited = self._inherited(task)
        found: list[tuple[np.ndarray, np.ndarray, list[str | None]]] = []
        for piece, state in self._states(task, ["keeper", "image_id"]):
            rows = np.flatnonzero(state["keeper"].to_numpy() >= 0)
            ids = (piece << barriers.PIECE_SHIFT) | rows
            found.append((ids, state["keeper"].to_numpy()[rows], state["image_id"].take(rows).to_pylist()))
        ids = np.concatenate([part[0] for part in found])
        roots = roots_of(ids, np.concatenate([part[1] for part in found]))
        images = [image for part in found for image in part[2]]
        sides: dict[int, str] = {}
        root_images: dict[int, str | None] = {}
        wanted = np.unique(roots)
        for piece, state in self._states(task, ["verdict", "image_id"]):
            mine = wanted[wanted >> barriers.PIECE_SHIFT == piece]
            rows = mine & ((1 << barriers.PIECE_SHIFT) - 1)
            part = state.take(rows).to_pylist()
            root_images.update(
                (root, row["image_id"])
                for root, row in zip(mine.tolist(), part, strict=True)
                if row["verdict"] == "kept"
            )
        for root, image in [*zip(roots.tolist(), images, strict=True), *root_images.items()]:
            side = inherited.get(image or "")
            if root in root_images and side and sides.get(root) != "held_out":
                sides[root] = side
        from_parents = set(sides)
        held_out = HeldOut(**task["held_out"])
        for root, image in root_images.items():
            sides.setdefault(root, drawn_side(held_out, image))
        members = np.concatenate([ids, np.array(sorted(root_images), np.int64)])
        codes = np.array([SIDES.index(sides.get(root)) for root in [*roots.tolist(), *sorted(root_images)]], np.int8)
        order = np.argsort(members)
        arrays = {
            "rows": members[order],
            "sides": codes[order],
            "inherited": np.array(sorted(from_parents), np.int64),
        }
        self.store.write_with(
            self._groups_path(task),
            lambda stream: np.savez(stream, **arrays),  # type: ignore[arg-type]
        )
        return {"groups": len(root_images)}

    def _groups_path(self, task: dict[str, Any]) -> str:
        return f"{task['base']}/groups-{task['key']}.npz"

    def _inherited(self, task: dict[str, Any]) -> dict[str, str]:
        """image_id -> side of all parents, read once a worker."""
        parents = tuple(task["parents"])
        if parents not in self.inherited:
            sides: dict[str, str] = {}
            for parent in parents:
                for image_id, side in open_snapshot(parent).sides().items():
                    if sides.get(image_id) != "held_out":
                        sides[image_id] = side
            self.inherited = {parents: sides}
        return self.inherited[parents]

    def gate(self, task: dict[str, Any]) -> dict[str, Any]:
        state = barriers.read_batch(self.store, f"{task['base']}/state-{task['piece']:06d}.arrow", 0)
        gates = [
            None if row["verdict"] == "kept" else f"not_measured({row['rule'] or row['stage']})"
            for row in state.select(["verdict", "rule", "stage"]).to_pylist()
        ]
        digests, first = [], 0
        for shard, path in zip(task["shards"], task["paths"], strict=True):
            mine = gates[first : first + self._rows_in(shard)]
            first += len(mine)
            write_table(self.store, path, pa.table({"gate": pa.array(mine, pa.string())}))
            digests.append(digest_of("gate", mine))
        return {"digests": digests}

    def verdicts(self, task: dict[str, Any]) -> dict[str, Any]:
        """The verdict files of a piece's shards, each row with its side of the split."""
        state = barriers.read_batch(self.store, f"{task['base']}/state-{task['piece']:06d}.arrow", 0)
        split, from_parents = self._split(task, state)
        table = state.drop_columns(["keeper", "image_id"]).append_column("split", pa.array(split, pa.string()))
        recorded = self._recorded(state)
        table = table.select(VERDICT_SCHEMA.names).cast(VERDICT_SCHEMA)
        for name, column in recorded.items():
            table = table.append_column(name, column)
        digests, kept, first = [], [], 0
        for shard, path in zip(task["shards"], task["paths"], strict=True):
            part = table.slice(first, self._rows_in(shard))
            first += part.num_rows
            write_table(self.store, path, part)
            digests.append(digest_of("verdicts", part.to_pylist()))
            kept.append(part["verdict"].to_pylist().count("kept"))
        sides = zip(split, state["verdict"].to_pylist(), strict=True)
        held_out = sum(side == "held_out" and verdict == "kept" for side, verdict in sides)
        return {"digests": digests, "kept": kept, "held_out": held_out, "inherited": from_parents}

    def _recorded(self, state: pa.Table) -> dict[str, pa.Array]:
        """What rules record of a piece's rows, by `<rule>.<name>`; null where a rule did not see a row."""
        found = {}
        for name, rule in self.rules:
            if rule.records:
                column = f"{name}.{rule.records.name}"
                seen = state[column].to_numpy() if column in state.column_names else np.full(state.num_rows, -1)
                found[column] = pa.array(seen, arrow_type(rule.records.type), mask=seen < 0)
        return found

    def _split(self, task: dict[str, Any], state: pa.Table) -> tuple[list[str | None], int]:
        """The side of each row of a piece, and how many kept rows have theirs from a parent."""
        inherited, held_out = self._inherited(task), HeldOut(**task["held_out"])
        with self.store.open(self._groups_path(task)) as stream, np.load(stream, allow_pickle=False) as arrays:
            groups = dict(arrays)
        mine = groups["rows"] >> barriers.PIECE_SHIFT == task["piece"]
        grouped = dict(zip(groups["rows"][mine].tolist(), groups["sides"][mine].tolist(), strict=True))
        split: list[str | None] = []
        from_parents = int((groups["inherited"] >> barriers.PIECE_SHIFT == task["piece"]).sum())
        for row, (verdict, image_id) in enumerate(
            zip(state["verdict"].to_pylist(), state["image_id"].to_pylist(), strict=True)
        ):
            code = grouped.get((task["piece"] << barriers.PIECE_SHIFT) | row)
            if code is not None:
                split.append(SIDES[code])
            elif verdict != "kept":
                split.append(None)
            else:
                side = inherited.get(image_id or "")
                from_parents += side is not None
                split.append(side or drawn_side(held_out, image_id))
        return split, from_parents

    def _rows_in(self, shard: Mapping[str, Any]) -> int:
        return pq.read_metadata(self.store.open(shard["rows"])).num_rows
