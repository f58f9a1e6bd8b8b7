"""The catalog's schema, migrations and addresses, on SQLite and on PostgreSQL."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from pipelines.lineage.catalog import HEAD, MIGRATIONS, Catalog, metadata, open_catalog


def _open(url: str) -> str:
    return open_catalog(url).address


def test_migrations_make_the_schema_that_the_code_uses(catalog: Catalog) -> None:
    with catalog.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == HEAD


def test_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_several_processes_may_open_a_new_catalog_at_once(catalog_url: str) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert len(set(pool.map(_open, [catalog_url] * 6))) == 1
    with open_catalog(catalog_url).read() as connection:
        assert sa.inspect(connection).has_table("edges")


def test_a_catalog_from_a_newer_sluice_is_refused(catalog: Catalog) -> None:
    with catalog.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ValueError, match=r"schema version 9999.*upgrade Sluice"):
        open_catalog(catalog.engine.url.render_as_string(hide_password=False))


def test_sqlite_uses_wal_and_waits(sqlite_catalog: Catalog) -> None:
    with sqlite_catalog.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() >= 10_000
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1


def test_default_address_is_the_environment_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CATALOG", str(tmp_path / "mine.db"))
    open_catalog()
    assert (tmp_path / "mine.db").is_file()
    monkeypatch.delenv("SLUICE_CATALOG")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_catalog()
    assert (tmp_path / "home" / ".sluice" / "catalog.db").is_file()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://x/y", "SQLite or PostgreSQL, not in mysql"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("not a url://", "sqlite:///FILE, postgresql://"),
        ("sqlite:////proc/nowhere/catalog.db", "SLUICE_CATALOG"),
        ("postgresql://u:secret@127.0.0.1:1/x", "cannot be opened"),
    ],
)
def test_a_bad_address_is_one_sentence_without_the_password(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_catalog(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("this is no database, it is a text that is long enough to be read as a header")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_catalog(str(tmp_path / "notes.txt"))
