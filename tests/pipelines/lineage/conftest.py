"""Catalogs to test on: a new SQLite file, and a new database on a private PostgreSQL server."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipelines.lineage.catalog import Catalog, open_catalog
from tests.pipelines.lineage.servers import postgres, programs

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    binaries = programs()
    if binaries is None:
        reason = "no PostgreSQL server program (initdb) here: install the package postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with postgres(binaries) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """The URL of a new, empty database."""
    name = f"catalog_{next(_numbers)}"
    engine = sa.create_engine(postgres_server.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    return f"{postgres_server.rpartition('/')[0]}/{name}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a catalog that does not exist yet, on each kind of database."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/catalogs/catalog.db"


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty catalog to copy: migrating one for every test is most of what such a test would take."""
    path = tmp_path_factory.mktemp("empty") / "catalog.db"
    open_catalog(str(path))
    return path


@pytest.fixture
def sqlite_catalog(empty_sqlite: Path, tmp_path: Path) -> Catalog:
    shutil.copy(empty_sqlite, tmp_path / "sqlite.db")
    return open_catalog(str(tmp_path / "sqlite.db"))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    """An empty catalog on each kind of database."""
    if request.param == "postgres":
        return open_catalog(request.getfixturevalue("postgres_url"))
    return request.getfixturevalue("sqlite_catalog")
