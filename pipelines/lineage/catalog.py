"""The catalog: a SQL database of runs, the artifacts they consumed and produced, and nothing about single rows.

    catalog = open_catalog()                                # $SLUICE_CATALOG, else ~/.sluice/catalog.db
    catalog = open_catalog("postgresql://team@db/sluice")   # one for a team

Four tables. `runs` holds what somebody started, `attempts` every time it was started (a resumed run is one run with two
attempts), `artifacts` what has a content digest, and `edges` which run read or wrote which artifact. Identity of an
artifact is (kind, digest): the same bytes at two addresses are one artifact, and each edge keeps the address its run
used. Rows never come here: what happened to one image is answered from the ledgers that snapshots carry.

SQLite runs in WAL mode and takes its write lock when a transaction begins, so two writers wait for each other and never
fail half-way through. No connection is kept between operations: a catalog works from any thread and survives fork().
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import URL, Connection, Dialect, Engine, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0001"  # the newest migration; a test holds it against the folder
BUSY_SECONDS = 60
MIGRATION_LOCK = 0x51_01_CE  # PostgreSQL advisory lock: one process migrates, the others wait

INPUT, OUTPUT = "input", "output"
RUNNING, SUCCEEDED, FAILED, INTERRUPTED = "running", "succeeded", "failed", "interrupted"


class UtcTime(sa.TypeDecorator[datetime]):
    """Points in time, aware and in UTC on the Python side whatever the database keeps."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "times in the catalog carry a time zone"
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Json = sa.JSON().with_variant(JSONB(), "postgresql")
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up only in a column called INTEGER

metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("started", UtcTime, nullable=False),
    sa.Column("finished", UtcTime),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("code_version", sa.Text, nullable=False),
    sa.Column("config", Json, nullable=False),
    sa.Column("config_digest", sa.String(64), nullable=False),
    sa.Column("seeds", Json, nullable=False),
    sa.Column("error", sa.Text),
    sa.Index("runs_by_name", "name"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("started", UtcTime, nullable=False),
    sa.Column("finished", UtcTime),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("process", sa.Integer, nullable=False),
    sa.Column("code_version", sa.Text, nullable=False),
    sa.Column("config_digest", sa.String(64), nullable=False),
    sa.Column("error", sa.Text),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("id", BigId, primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("digest", sa.String(128), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("address", sa.Text, nullable=False),
    sa.Column("facts", Json, nullable=False),
    sa.Column("first_seen", UtcTime, nullable=False),
    sa.UniqueConstraint("kind", "digest", name="artifacts_identity"),
    sa.Index("artifacts_by_digest", "digest"),
    sa.Index("artifacts_by_name", "name"),
)

edges = sa.Table(
    "edges",
    metadata,
    sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("role", sa.String(8), primary_key=True),
    sa.Column("artifact_id", BigId, sa.ForeignKey("artifacts.id"), primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("address", sa.Text, nullable=False),
    sa.Index("edges_by_artifact", "artifact_id", "role"),
)


@dataclass(frozen=True)
class Catalog:
    """An open catalog. `read()` and `write()` give a connection inside one transaction each."""

    engine: Engine

    @property
    def address(self) -> str:
        """The catalog's URL, its password hidden."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes: on SQLite it takes the write lock at once, where it can still wait for it."""
        with self.engine.connect() as connection:
            connection = connection.execution_options(sluice_writes=True)
            with connection.begin():
                yield connection


def open_catalog(url: str | None = None) -> Catalog:
    """Open the catalog at `url` (a SQLAlchemy URL, or the path of a SQLite file), creating or migrating it if needed.

    Without a url: $SLUICE_CATALOG, else ~/.sluice/catalog.db. Raises ValueError with one sentence where the address
    cannot be used or the catalog was written by a newer Sluice.
    """
    where = _parse(url or os.environ.get("SLUICE_CATALOG") or str(Path.home() / ".sluice" / "catalog.db"))
    shown = where.render_as_string(hide_password=True)
    if where.get_backend_name() == "sqlite":
        try:
            Path(str(where.database)).expanduser().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the catalog's folder cannot be made for {shown}: {error}; set SLUICE_CATALOG") from error
    engine = sa.create_engine(where, poolclass=sa.pool.NullPool)
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine)
    catalog = Catalog(engine)
    try:
        _migrate(catalog)
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise ValueError(
            f"the catalog {shown} cannot be opened: {cause[0] if cause else error}; "
            "check that it is reachable and writable, or set SLUICE_CATALOG to another one"
        ) from error
    return catalog


def _parse(url: str) -> URL:
    if "://" not in url:
        return URL.create("sqlite", database=str(Path(url).expanduser().absolute()))
    scheme = url.partition("://")[0]
    try:
        where = make_url(url)
    except ArgumentError as error:
        raise ValueError(
            f"a catalog's address is sqlite:///FILE, postgresql://..., or a path; got {scheme}://..."
        ) from error
    backend = scheme.partition("+")[0]
    if backend in ("postgres", "postgresql"):
        return where.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ValueError(
            f"a catalog lives in SQLite or PostgreSQL, not in {backend}; use sqlite:///FILE or postgresql://"
        )
    if not where.database or where.database == ":memory:":
        raise ValueError("a catalog in memory is gone when the command ends; name a file: sqlite:///FILE")
    return where.set(database=str(Path(where.database).expanduser().absolute()))


def _prepare_sqlite(engine: Engine) -> None:
    """Own the transactions (the driver's would start them late) and switch on WAL, foreign keys and waiting."""

    @sa.event.listens_for(engine, "connect")
    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("sluice_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _use_wal(engine: Engine) -> None:
    """Readers then never wait for a writer. Where the file system has no shared memory SQLite stays as it was."""
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        for patience in range(50):  # the switch ignores busy_timeout while another process makes it too
            try:
                cursor.execute("PRAGMA journal_mode = WAL")
                break
            except Exception as error:
                if "locked" not in str(error) or patience == 49:
                    raise
                time.sleep(0.02 * (patience + 1))
    finally:
        raw.close()


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _migrate(catalog: Catalog) -> None:
    """Bring the schema to HEAD; of several processes that open a new catalog at once, one does it."""
    with catalog.read() as connection:
        found = _revision(connection)
    if found == HEAD:
        return
    if catalog.engine.dialect.name == "sqlite":
        try:
            _use_wal(catalog.engine)
        except Exception as error:
            raise OperationalError("PRAGMA journal_mode = WAL", {}, error) from error

    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with catalog.write() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        found = _revision(connection)
        if found == HEAD:
            return
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise ValueError(
                f"the catalog {catalog.address} has schema version {found}, and this Sluice knows none newer than "
                f"{HEAD}: upgrade Sluice, or set SLUICE_CATALOG to another catalog"
            ) from error
