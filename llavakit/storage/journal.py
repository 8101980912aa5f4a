"""A durable journal: key -> JSON record, written once, in order.

Owns: one SQLite file in WAL mode with full syncs. Invariant: a record that put() returned from survives kill -9 and power
loss; a torn write leaves no trace. Made for work that is paid for per item: generated data, judged answers, replies.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llavakit.errors import StorageError

__all__ = ["Journal"]

_SCHEMA = "CREATE TABLE IF NOT EXISTS records (position INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, value TEXT NOT NULL)"


class Journal:
    """An append-only table of records; use it as a context manager, from one thread."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal. Raises: StorageError when the file is no journal or cannot be opened."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise StorageError(f"cannot open the journal {path}: {error}") from error
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_SCHEMA)
        except sqlite3.Error as error:
            self._db.close()
            raise StorageError(f"{path} is not a journal: {error}") from error

    def put(self, key: str, value: Any) -> bool:
        """Record a JSON value under a new key; False, and nothing changes, when the key is there already."""
        return self.put_many({key: value}) == 1

    def put_many(self, records: dict[str, Any]) -> int:
        """Record several values in one durable step, all or none; returns how many keys were new. Raises: StorageError."""
        rows = [(key, json.dumps(value)) for key, value in records.items()]
        try:
            with self._db:  # commits, or rolls back on an error
                self._db.execute("BEGIN IMMEDIATE")
                return sum(self._db.execute("INSERT OR IGNORE INTO records (key, value) VALUES (?, ?)", row).rowcount for row in rows)
        except sqlite3.Error as error:
            raise StorageError(f"cannot write to the journal: {error}") from error

    def get(self, key: str) -> Any:
        """Return the record of a key. Raises: KeyError."""
        row = self._db.execute("SELECT value FROM records WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        return json.loads(row[0])

    def __contains__(self, key: str) -> bool:
        return self._db.execute("SELECT 1 FROM records WHERE key = ?", (key,)).fetchone() is not None

    def __len__(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM records").fetchone()[0])

    def items(self) -> Iterator[tuple[str, Any]]:
        """Iterate over keys and records in the order in which they were put."""
        for key, value in self._db.execute("SELECT key, value FROM records ORDER BY position"):
            yield key, json.loads(value)

    def close(self) -> None:
        """Close the file; everything is on disk already."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
