"""Questions to the catalog: where did this come from, and what came of it?

    trace(catalog, "tiny-student")          back through runs to the raw shards, with digests
    impact(catalog, "shard digest")         forward to every snapshot, model and student

Both are one recursive query and two look-ups, however large the graph is. A pretrained weight has no producing run:
what it was trained on is unknown, and is called so rather than clean.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from pipelines.lineage.catalog import (
    INPUT,
    INTERRUPTED,
    OUTPUT,
    RUNNING,
    Catalog,
    artifacts,
    attempts,
    edges,
    runs,
)
from pipelines.lineage.ledger import existing_path
from pipelines.lineage.record import process_lives

TRAINED_KINDS = ("checkpoint", "model", "student", "export")
SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class ArtifactInfo:
    """An artifact as the catalog knows it. `id` is the catalog's own number and means nothing outside it."""

    id: int
    kind: str
    digest: str
    name: str
    address: str
    facts: Mapping[str, Any]
    first_seen: datetime


@dataclass(frozen=True)
class RunInfo:
    """A run as the catalog knows it; `attempts` counts how often it was started."""

    id: str
    kind: str
    name: str
    status: str
    started: datetime
    finished: datetime | None
    host: str
    code_version: str
    config_digest: str
    seeds: Mapping[str, Any]
    error: str | None
    attempts: int = 1


@dataclass(frozen=True)
class Edge:
    run_id: str
    role: str
    artifact_id: int
    position: int
    address: str


@dataclass(frozen=True)
class Lineage:
    """A part of the graph: all that lies behind `start` (direction "trace") or ahead of it ("impact")."""

    direction: str
    start: ArtifactInfo | RunInfo
    artifacts: Mapping[int, ArtifactInfo]
    runs: Mapping[str, RunInfo]
    edges: Sequence[Edge]

    def of_kind(self, *kinds: str) -> list[ArtifactInfo]:
        """The artifacts of these kinds, the start itself left out, by name."""
        found = [one for one in self.artifacts.values() if one.kind in kinds and one != self.start]
        return sorted(found, key=lambda one: (one.name, one.digest))

    def unknown_origin(self) -> list[ArtifactInfo]:
        """Artifacts behind the start that no recorded run made and that are no raw data: nobody knows their data."""
        if self.direction != "trace":
            return []
        made = {edge.artifact_id for edge in self.edges if edge.role == OUTPUT}
        return [one for one in self.artifacts.values() if one.kind != "raw_shard" and one.id not in made]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; artifacts are named by "kind:digest"."""
        key = {one.id: f"{one.kind}:{one.digest}" for one in self.artifacts.values()}
        start = self.start
        return {
            "direction": self.direction,
            "start": {"run": start.id} if isinstance(start, RunInfo) else {"artifact": f"{start.kind}:{start.digest}"},
            "artifacts": [artifact_json(one) for one in self.artifacts.values()],
            "runs": [run_json(one) for one in self.runs.values()],
            "edges": [
                {"run": edge.run_id, "role": edge.role, "artifact": key[edge.artifact_id], "address": edge.address}
                for edge in self.edges
            ],
            "raw_shards": [
                {"digest": one.digest, "name": one.name, "address": one.address} for one in self.of_kind("raw_shard")
            ],
            "unknown_origin": [key[one.id] for one in self.unknown_origin()],
        }


def artifact_json(one: ArtifactInfo) -> dict[str, Any]:
    return {name: value for name, value in plain(asdict(one)).items() if name != "id"}


def run_json(one: RunInfo) -> dict[str, Any]:
    return dict(plain(asdict(one)))


def plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


# --- what an argument names -------------------------------------------------------------------------------------------


def resolve(catalog: Catalog, text: str) -> ArtifactInfo | RunInfo:
    """The artifact, else the run, that `text` names: a path, a digest or id or its beginning, or a name.

    "student:tiny" looks among students only. Raises ValueError with one sentence where nothing fits, or where several
    do: then the sentence lists them.
    """
    kind, _, rest = text.partition(":")
    if not rest or not re.fullmatch(r"[a-z][a-z0-9_]*", kind) or rest.startswith("//"):
        kind, rest = "", text
    only = {digest for found in _digests_at(rest) for digest in [found]} if not kind else set()
    with catalog.read() as connection:
        for wanted in _artifact_tests(rest, only):
            query = sa.select(artifacts).where(wanted)
            if kind:
                query = query.where(artifacts.c.kind == kind)
            found: list[ArtifactInfo | RunInfo] = [
                ArtifactInfo(**row) for row in connection.execute(query.limit(1000)).mappings()
            ]
            if found:
                return _only(text, found)
        for wanted in _run_tests(rest, only):
            query = sa.select(runs.c.id).where(wanted)
            if kind:
                query = query.where(runs.c.kind == kind)
            ids = list(connection.execute(query.limit(1000)).scalars())
            if ids:
                return _only(text, list(_load_runs(connection, ids).values()))
        counts = connection.execute(
            sa.select(artifacts.c.kind, sa.func.count()).group_by(artifacts.c.kind).order_by(artifacts.c.kind)
        ).all()
    holds = ", ".join(f"{count} {_plural(kind, count)}" for kind, count in counts) or "nothing yet"
    raise ValueError(
        f"nothing in the catalog {catalog.address} is called {text!r} (it holds {holds}): give a name, a path, or at "
        f"least {SHORTEST_PREFIX} characters of a digest or run id"
    )


def _digests_at(text: str) -> list[str]:
    """Digests and run ids written in the manifest or record of the folder that `text` is the path of."""
    path = existing_path(text)
    if path is None or not path.is_dir():
        return []
    latest = path / "latest"
    if latest.is_file():
        return [latest.read_text().strip()]
    found = []
    # A run's folder stands for the model that came of it, and for the run itself while there is none.
    for name, key in (
        ("manifest.json", "id"),
        ("model.json", "digest"),
        ("meta.json", "digest"),
        ("model/model.json", "digest"),
        ("run.json", "id"),
    ):
        if (path / name).is_file():
            said = json.loads((path / name).read_text()).get(key)
            found += [str(said)] if said else []
    return found


def _artifact_tests(text: str, at_path: set[str]) -> list[Any]:
    if not text:
        return []
    tests: list[Any] = []
    if at_path:
        tests.append(artifacts.c.digest.in_(at_path))
    if "/" in text or existing_path(text):
        tests.append(artifacts.c.address.in_({text.rstrip("/"), str(Path(text).expanduser().absolute())}))
    tests.append(artifacts.c.digest == text)
    tests.append(artifacts.c.name == text)
    if len(text) >= SHORTEST_PREFIX:
        tests.append(artifacts.c.digest.startswith(text, autoescape=True))
    return tests


def _run_tests(text: str, at_path: set[str]) -> list[Any]:
    if not text:
        return []
    tests: list[Any] = [runs.c.id.in_(at_path)] if at_path else []
    tests += [runs.c.id == text, runs.c.name == text]
    if len(text) >= SHORTEST_PREFIX:
        tests.append(runs.c.id.startswith(text, autoescape=True))
    return tests


def _only(text: str, found: Sequence[ArtifactInfo | RunInfo]) -> ArtifactInfo | RunInfo:
    if len(found) == 1:
        return found[0]

    def when(one: ArtifactInfo | RunInfo) -> datetime:
        return one.started if isinstance(one, RunInfo) else one.first_seen

    def described(one: ArtifactInfo | RunInfo) -> str:
        word = f"{one.kind} run {one.id[:16]}" if isinstance(one, RunInfo) else f"{one.kind} {one.digest[:16]}"
        return f"{word} ({one.name or 'no name'}, {when(one):%Y-%m-%d %H:%M})"

    shown = ", ".join(map(described, sorted(found, key=when, reverse=True)[:8]))
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    raise ValueError(f"{text!r} is ambiguous, {len(found)} fit: {shown}{more}; give more of the digest or id")


def _plural(kind: str, count: int) -> str:
    word = kind.replace("_", " ")
    return word if count == 1 or word.endswith("s") else word + "s"


# --- the graph --------------------------------------------------------------------------------------------------------


def trace(catalog: Catalog, start: str | ArtifactInfo | RunInfo) -> Lineage:
    """Everything `start` was made from, back to the raw shards."""
    return _closure(catalog, start, "trace")


def impact(catalog: Catalog, start: str | ArtifactInfo | RunInfo) -> Lineage:
    """Everything that was made from `start`: snapshots, checkpoints, models, students, reports."""
    return _closure(catalog, start, "impact")


def _closure(catalog: Catalog, start: str | ArtifactInfo | RunInfo, direction: str) -> Lineage:
    if isinstance(start, str):
        start = resolve(catalog, start)
    # Backward, a run is entered by what it wrote and left by what it read; forward, the other way round.
    enter, leave = (OUTPUT, INPUT) if direction == "trace" else (INPUT, OUTPUT)
    into, out_of = edges.alias("into"), edges.alias("out_of")
    if isinstance(start, RunInfo):
        first = sa.select(edges.c.artifact_id).where(edges.c.run_id == start.id, edges.c.role == leave)
    else:
        first = sa.select(sa.literal(start.id, sa.BigInteger).label("artifact_id"))
    reach = first.cte("reach", recursive=True)
    reach = reach.union(
        sa.select(out_of.c.artifact_id)
        .select_from(reach)
        .join(into, sa.and_(into.c.artifact_id == reach.c.artifact_id, into.c.role == enter))
        .join(out_of, sa.and_(out_of.c.run_id == into.c.run_id, out_of.c.role == leave))
    )
    reached = sa.select(reach.c.artifact_id)
    entered: Any = sa.select(edges.c.run_id).where(edges.c.artifact_id.in_(reached), edges.c.role == enter)
    if isinstance(start, RunInfo):
        entered = entered.union(sa.select(sa.literal(start.id)))
    own = sa.or_(edges.c.role == leave, edges.c.artifact_id.in_(reached))
    with catalog.read() as connection:
        found_edges = [
            Edge(**row)
            for row in connection.execute(
                sa.select(edges)
                .where(edges.c.run_id.in_(entered), own)
                .order_by(edges.c.run_id, edges.c.role, edges.c.position)
            ).mappings()
        ]
        found_artifacts = [
            ArtifactInfo(**row)
            for row in connection.execute(
                sa.select(artifacts).where(artifacts.c.id.in_(reached)).order_by(artifacts.c.id)
            ).mappings()
        ]
        found_runs = _load_runs(connection, entered)
    return Lineage(direction, start, {one.id: one for one in found_artifacts}, found_runs, found_edges)


def _load_runs(connection: Connection, ids: Any) -> dict[str, RunInfo]:
    tried = (
        sa.select(attempts.c.run_id, sa.func.count().label("attempts"))
        .where(attempts.c.run_id.in_(ids))
        .group_by(attempts.c.run_id)
        .subquery()
    )
    running = (
        sa.select(attempts.c.process)
        .where(attempts.c.run_id == runs.c.id, attempts.c.status == RUNNING)
        .order_by(attempts.c.number.desc())
        .limit(1)
        .scalar_subquery()
        .label("process")
    )
    wanted = [runs.c[one.name] for one in fields(RunInfo) if one.name != "attempts"]
    query = (
        sa.select(*wanted, tried.c.attempts, running)
        .join(tried, tried.c.run_id == runs.c.id)
        .where(runs.c.id.in_(ids))
        .order_by(runs.c.started, runs.c.id)
    )
    loaded: dict[str, RunInfo] = {}
    for row in connection.execute(query).mappings():
        values = dict(row)
        process = values.pop("process")
        if values["status"] == RUNNING and process is not None and not process_lives(values["host"], process):
            values.update(status=INTERRUPTED, error="its process ended without a word; run the same command to resume")
        loaded[values["id"]] = RunInfo(**values)
    return loaded


@dataclass(frozen=True)
class Card:
    """One artifact or run with its nearest neighbours, for `lineage show`."""

    subject: ArtifactInfo | RunInfo
    made_by: Sequence[RunInfo] = ()
    used_by: Sequence[RunInfo] = ()
    read: Sequence[ArtifactInfo] = ()
    wrote: Sequence[ArtifactInfo] = ()
    tries: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        if isinstance(self.subject, RunInfo):
            return {
                "run": {**run_json(self.subject), "config": plain(self.config)},
                "attempts": plain(list(self.tries)),
                "inputs": [artifact_json(one) for one in self.read],
                "outputs": [artifact_json(one) for one in self.wrote],
            }
        return {
            "artifact": artifact_json(self.subject),
            "made_by": [run_json(one) for one in self.made_by],
            "used_by": [run_json(one) for one in self.used_by],
        }


def show(catalog: Catalog, start: str | ArtifactInfo | RunInfo) -> Card:
    """What the catalog knows about one artifact or run."""
    if isinstance(start, str):
        start = resolve(catalog, start)
    with catalog.read() as connection:
        if isinstance(start, ArtifactInfo):

            def by(role: str) -> list[RunInfo]:
                ids = sa.select(edges.c.run_id).where(edges.c.artifact_id == start.id, edges.c.role == role)
                return list(_load_runs(connection, ids).values())

            return Card(start, made_by=by(OUTPUT), used_by=by(INPUT))

        def of(role: str) -> list[ArtifactInfo]:
            query = (
                sa.select(artifacts)
                .join(edges, edges.c.artifact_id == artifacts.c.id)
                .where(edges.c.run_id == start.id, edges.c.role == role)
                .order_by(edges.c.position, artifacts.c.id)
            )
            return [ArtifactInfo(**row) for row in connection.execute(query).mappings()]

        tries = connection.execute(sa.select(attempts).where(attempts.c.run_id == start.id).order_by(attempts.c.number))
        config = connection.execute(sa.select(runs.c.config).where(runs.c.id == start.id)).scalar_one()
        return Card(
            start, read=of(INPUT), wrote=of(OUTPUT), tries=[dict(row) for row in tries.mappings()], config=config
        )


def snapshots(catalog: Catalog) -> list[ArtifactInfo]:
    """Every snapshot in the catalog, the newest first."""
    query = sa.select(artifacts).where(artifacts.c.kind == "snapshot").order_by(artifacts.c.id.desc())
    with catalog.read() as connection:
        return [ArtifactInfo(**row) for row in connection.execute(query).mappings()]


# --- who learned from a snapshot --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exposure:
    """A run that was given a snapshot holding the sample, or a model that descends from one, with what it made.

    grade: "member": the sample is in the snapshot, an upper bound on what was read. direct: the run read the snapshot
    itself; otherwise it inherits through `through` (a teacher, a checkpoint).
    """

    run: RunInfo
    made: Sequence[ArtifactInfo]
    through: ArtifactInfo
    direct: bool
    grade: str = "member"


def exposures(catalog: Catalog, snapshot_ids: Iterable[str]) -> list[Exposure]:
    """Runs, and the models they made, that learned from these snapshots, directly or through a teacher.

    The way forward stops at other snapshots: a later snapshot may have dropped the sample, so it is asked itself.
    """
    wanted = sorted(set(snapshot_ids))
    if not wanted:
        return []
    start = sa.select(artifacts.c.id).where(artifacts.c.kind == "snapshot", artifacts.c.digest.in_(wanted))
    into, out_of, made = edges.alias("into"), edges.alias("out_of"), artifacts.alias("made")
    reach = start.cte("reach", recursive=True)
    reach = reach.union(
        sa.select(out_of.c.artifact_id)
        .select_from(reach)
        .join(into, sa.and_(into.c.artifact_id == reach.c.id, into.c.role == INPUT))
        .join(out_of, sa.and_(out_of.c.run_id == into.c.run_id, out_of.c.role == OUTPUT))
        .join(made, sa.and_(made.c.id == out_of.c.artifact_id, made.c.kind.in_(TRAINED_KINDS)))
    )
    readers = (
        sa.select(edges.c.run_id, edges.c.artifact_id)
        .join(reach, reach.c.id == edges.c.artifact_id)
        .join(runs, runs.c.id == edges.c.run_id)
        .where(edges.c.role == INPUT, runs.c.kind.in_(("train", "distill")))
        .order_by(edges.c.run_id, edges.c.position)
    )
    with catalog.read() as connection:
        pairs = connection.execute(readers).all()
        ids = sorted({run_id for run_id, _ in pairs})
        by_run: dict[str, list[ArtifactInfo]] = defaultdict(list)
        written = (
            sa.select(edges.c.run_id.label("run_id"), artifacts)
            .join(artifacts, artifacts.c.id == edges.c.artifact_id)
            .where(edges.c.run_id.in_(ids), edges.c.role == OUTPUT, artifacts.c.kind.in_(TRAINED_KINDS))
            .order_by(edges.c.run_id, edges.c.position)
        )
        for row in connection.execute(written).mappings():
            values = dict(row)
            by_run[values.pop("run_id")].append(ArtifactInfo(**values))
        sources = {
            row["id"]: ArtifactInfo(**row)
            for row in connection.execute(
                sa.select(artifacts).where(artifacts.c.id.in_({number for _, number in pairs}))
            ).mappings()
        }
        known = _load_runs(connection, ids)
    found: list[Exposure] = []
    for run in known.values():
        read = [sources[number] for run_id, number in pairs if run_id == run.id]
        own = {one.id for one in by_run[run.id]}
        direct = [one for one in read if one.kind == "snapshot"]
        # A run that resumes reads its own checkpoints: that is no inheritance.
        through = direct or [one for one in read if one.id not in own]
        if through:
            found.append(Exposure(run, by_run[run.id], through[0], bool(direct)))
    return found
