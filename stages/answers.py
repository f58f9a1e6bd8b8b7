"""Answers of captioners, recorded the moment they arrive, so that none is ever paid for twice.

One SQLite file in write-ahead mode, every record flushed to the disk before anything is made of it: a killed run loses
only what was still under way. Records are raw, before any cleaning, and named by what was asked: picture, model and
revision, prompt, sampling and ordinal. So another recipe, another shard or another cleaning finds them again.

The file wants a disk with locks: one machine's own, or a shared one that has them. Object stores will not do.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from stages.captioners import Answer

FILE = "answers.db"
_ASKED_AT_ONCE = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, image_id TEXT NOT NULL, model TEXT NOT NULL, status TEXT NOT NULL, text TEXT NOT NULL,
    reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
) WITHOUT ROWID
"""


class AnswerBook:
    """Recorded answers by request key; many processes may read and write one file, threads share one connection."""

    def __init__(self, folder: Path | str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = Path(folder) / FILE
        self._lock = threading.Lock()
        self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def find(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The recorded answers among `keys`."""
        found: dict[str, Answer] = {}
        for part in _parts(list(keys)):
            marks = ",".join("?" * len(part))
            query = (
                "SELECT key, status, text, reason, prompt_tokens, completion_tokens FROM answers "
                f"WHERE key IN ({marks})"
            )
            with self._lock:
                rows = self._database.execute(query, part).fetchall()
            found.update({key: Answer(*values) for key, *values in rows})
        return found

    def record(self, answers: Mapping[str, tuple[str, str, Answer]]) -> None:
        """Flush answers (key -> (image_id, model, answer)) to the disk in one transaction; the first of a key stays."""
        rows = [(key, image_id, model, *astuple(answer)) for key, (image_id, model, answer) in answers.items()]
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def forget(self, image_ids: Iterable[str]) -> int:
        """Delete every answer about these pictures; returns how many there were."""
        gone = 0
        for part in _parts(list(image_ids)):
            with self._lock:
                marks = ",".join("?" * len(part))
                gone += self._database.execute(f"DELETE FROM answers WHERE image_id IN ({marks})", part).rowcount
        return gone

    def tokens(self, model: str) -> tuple[int, float, float]:
        """(answers, mean prompt tokens, mean completion tokens) recorded for a model: what an estimate stands on."""
        query = "SELECT count(*), avg(prompt_tokens), avg(completion_tokens) FROM answers WHERE model = ?"
        with self._lock:
            count, asked, given = self._database.execute(query, (model,)).fetchone()
        return int(count), float(asked or 0), float(given or 0)


def _parts(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), _ASKED_AT_ONCE):
        yield keys[start : start + _ASKED_AT_ONCE]
