"""Write what a command did into the catalog: one run, its attempts, and the artifacts it read and wrote.

    with record_run(catalog, kind="train", name="tiny", config=recipe, seeds={"weights": 0}, run_id=run_id) as run:
        run.consume(Artifact(kind="snapshot", digest=snapshot_id, address=folder))
        ...
        run.produce(Artifact(kind="model", digest=digest, address=str(out), name="tiny", facts={"steps": 1500}))

Everything is written when it is said, each call in one transaction, so a killed run leaves what it had read so far.
Saying a thing twice changes nothing, and the same `run_id` again is that run with one more attempt: so it resumes.
The run ends "succeeded", "failed" (any exception, its message kept) or "interrupted" (Ctrl-C, or the exit codes of
SIGINT and SIGTERM). One killed outright reads "running" until it is resumed; `process_lives` tells the two apart.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from pipelines.lineage.catalog import (
    FAILED,
    INPUT,
    INTERRUPTED,
    OUTPUT,
    RUNNING,
    SUCCEEDED,
    Catalog,
    artifacts,
    attempts,
    edges,
    open_catalog,
    runs,
)
from stages.contract import digest_of

DIGESTS_A_QUERY = 5000  # SQLite binds at most 32,766 values in a statement
INTERRUPT_CODES = (130, 143, -2, -15)


@dataclass(frozen=True)
class Artifact:
    """Something with a content digest that runs read or write; its identity is (kind, digest).

    kind: raw_shard, weights, snapshot, checkpoint, model, student, report, or another lower-case word.
    address: where it lies, a path or URL. facts: a few JSON values worth showing (rows, steps, size_bytes).
    """

    kind: str
    digest: str
    address: str = ""
    name: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_word("an artifact's kind", self.kind)
        if not self.digest or len(self.digest) > 128 or any(c.isspace() for c in self.digest):
            raise ValueError(f"a {self.kind}'s digest is 1 to 128 characters without spaces; got {self.digest!r}")


@dataclass(frozen=True)
class Run:
    """A run that is being recorded. Safe to use from several threads."""

    id: str
    attempt: int
    catalog: Catalog
    clock: Callable[[], datetime]

    def consume(self, artifact: Artifact) -> None:
        """Say that this run read `artifact`."""
        self.consume_many([artifact])

    def consume_many(self, many: Iterable[Artifact]) -> None:
        """Say that this run read all of `many`, in this order, in one transaction (thousands of raw shards)."""
        self._link(INPUT, many)

    def produce(self, artifact: Artifact) -> None:
        """Say that this run wrote `artifact`."""
        self.produce_many([artifact])

    def produce_many(self, many: Iterable[Artifact]) -> None:
        self._link(OUTPUT, many)

    def _link(self, role: str, many: Iterable[Artifact]) -> None:
        wanted = list({(one.kind, one.digest): one for one in many}.values())
        if not wanted:
            return
        with self.catalog.write() as connection:
            # One writer a run at a time, so that positions are an order (on SQLite there is but one writer anyway).
            connection.execute(sa.select(runs.c.id).where(runs.c.id == self.id).with_for_update())
            ids = _put_artifacts(connection, wanted, self.clock())
            taken = connection.execute(
                sa.select(sa.func.coalesce(sa.func.max(edges.c.position) + 1, 0)).where(
                    edges.c.run_id == self.id, edges.c.role == role
                )
            ).scalar_one()
            rows = [
                {
                    "run_id": self.id,
                    "role": role,
                    "artifact_id": ids[one.kind, one.digest],
                    "position": taken + offset,
                    "address": one.address,
                }
                for offset, one in enumerate(wanted)
            ]
            connection.execute(_insert(connection, edges).on_conflict_do_nothing(), rows)


@contextmanager
def record_run(
    catalog: Catalog | str | None,
    *,
    kind: str,
    name: str,
    config: Mapping[str, Any] | None = None,
    seeds: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    version: str | None = None,
    started: datetime | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Iterator[Run]:
    """Record the body of the `with` as a run, or as one more attempt of the run that `run_id` names.

    kind: curate, select, train, distill, sample, report, or another lower-case word. config: the resolved recipe, as
    JSON values; its digest is kept an attempt, so a resume with other settings can be seen. version: of the code; by
    default `code_version()`. started: when the work began, if it is recorded only afterwards.
    """
    if not isinstance(catalog, Catalog):
        catalog = open_catalog(catalog)
    _check_word("a run's kind", kind)
    if run_id is not None and not re.fullmatch(r"[\w.:-]{1,64}", run_id):
        raise ValueError(f"a run's id is 1 to 64 letters, digits, '_', '.', ':' or '-'; got {run_id!r}")
    run = Run(run_id or uuid.uuid4().hex, 0, catalog, clock)
    number = _begin(run, kind, name, dict(config or {}), dict(seeds or {}), version or code_version(), started)
    run = Run(run.id, number, catalog, clock)
    try:
        yield run
    except BaseException as error:
        status = _status_of(error)
        message = None if status == SUCCEEDED else f"{type(error).__name__}: {error}"[:2000]
        _end(run, status, message)
        raise
    _end(run, SUCCEEDED, None)


@functools.cache
def code_version() -> str:
    """Sluice's version, with the commit (and "dirty" where files differ from it) when it runs from a checkout."""
    try:
        version = packages.version("sluice")
    except packages.PackageNotFoundError:
        version = "unknown"
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version
    ask = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=20)
    try:
        commit = ask(["git", "rev-parse", "--short=12", "HEAD"])
        if commit.returncode:
            return version
        changed = ask(["git", "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.TimeoutExpired):
        return version
    return f"{version}+{commit.stdout.strip()}{'.dirty' if changed.stdout.strip() else ''}"


def _begin(
    run: Run,
    kind: str,
    name: str,
    config: dict[str, Any],
    seeds: dict[str, Any],
    version: str,
    started: datetime | None,
) -> int:
    now, host = started or run.clock(), socket.gethostname()
    said = {
        "kind": kind,
        "name": name,
        "status": RUNNING,
        "host": host,
        "code_version": version,
        "config": config,
        "config_digest": digest_of(config),
        "seeds": seeds,
    }
    with run.catalog.write() as connection:
        fresh = _insert(connection, runs).values(id=run.id, started=now, **said)
        connection.execute(fresh.on_conflict_do_nothing())
        # Locks the row on PostgreSQL until this transaction ends: two attempts cannot take one number.
        connection.execute(sa.update(runs).where(runs.c.id == run.id).values(finished=None, error=None, **said))
        before = connection.execute(sa.select(attempts).where(attempts.c.run_id == run.id)).mappings().all()
        for old in before:
            if old["status"] == RUNNING and not process_lives(old["host"], old["process"]):
                connection.execute(
                    sa.update(attempts)
                    .where(attempts.c.run_id == run.id, attempts.c.number == old["number"])
                    .values(status=INTERRUPTED, error="its process ended without a word")
                )
        number = max((old["number"] for old in before), default=0) + 1
        connection.execute(
            attempts.insert().values(
                run_id=run.id,
                number=number,
                status=RUNNING,
                started=now,
                host=host,
                process=os.getpid(),
                code_version=version,
                config_digest=said["config_digest"],
            )
        )
    return number


def _end(run: Run, status: str, error: str | None) -> None:
    now = run.clock()
    with run.catalog.write() as connection:
        connection.execute(
            sa.update(attempts)
            .where(attempts.c.run_id == run.id, attempts.c.number == run.attempt)
            .values(status=status, finished=now, error=error)
        )
        newest = sa.select(sa.func.max(attempts.c.number)).where(attempts.c.run_id == run.id).scalar_subquery()
        connection.execute(
            sa.update(runs)
            .where(runs.c.id == run.id, newest == run.attempt)
            .values(status=status, finished=now, error=error)
        )


def process_lives(host: str, process: int) -> bool:
    """Whether an attempt's process may still run: unknown, so yes, for other hosts."""
    if host != socket.gethostname():
        return True
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _status_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        return INTERRUPTED
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    if code in (0, None):
        return SUCCEEDED
    return INTERRUPTED if code in INTERRUPT_CODES else FAILED


def _put_artifacts(connection: Connection, wanted: list[Artifact], now: datetime) -> dict[tuple[str, str], int]:
    """Insert what is new, refresh name, address and facts of what is known, and return every id."""
    # One order for all writers: two that name the same shards in different orders would deadlock on PostgreSQL.
    ordered = sorted(wanted, key=lambda one: (one.kind, one.digest))
    insert = _insert(connection, artifacts)
    new = insert.excluded
    better = {name: sa.case((new[name] != "", new[name]), else_=artifacts.c[name]) for name in ("name", "address")}
    better["facts"] = sa.case((sa.cast(new.facts, sa.Text) != "{}", new.facts), else_=artifacts.c.facts)
    rows = [
        {
            "kind": one.kind,
            "digest": one.digest,
            "name": one.name,
            "address": one.address,
            "facts": dict(one.facts),
            "first_seen": now,
        }
        for one in ordered
    ]
    connection.execute(insert.on_conflict_do_update(index_elements=["kind", "digest"], set_=better), rows)
    ids: dict[tuple[str, str], int] = {}
    for start in range(0, len(ordered), DIGESTS_A_QUERY):
        part = ordered[start : start + DIGESTS_A_QUERY]
        query = sa.select(artifacts.c.kind, artifacts.c.digest, artifacts.c.id).where(
            artifacts.c.kind.in_({one.kind for one in part}), artifacts.c.digest.in_([one.digest for one in part])
        )
        ids.update({(kind, digest): number for kind, digest, number in connection.execute(query)})
    return ids


def _insert(connection: Connection, table: sa.Table) -> Any:
    """INSERT in the database's own dialect: both know ON CONFLICT, and SQLAlchemy has no word common to them."""
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def _check_word(what: str, word: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", word):
        raise ValueError(f"{what} is a lower-case word of at most 32 letters, digits and '_'; got {word!r}")
