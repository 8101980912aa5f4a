"""storage.journal: what put() returned from is there, once, in order."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llavakit.errors import StorageError
from llavakit.storage.journal import Journal


def test_records_come_back_in_order_after_reopening(tmp_path: Path) -> None:
    records = {f"key {i}": {"value": i, "text": "ü\n"} for i in (3, 1, 2)}
    with Journal(tmp_path / "j.db") as journal:
        assert [journal.put(key, value) for key, value in records.items()] == [True] * 3
    with Journal(tmp_path / "j.db") as journal:
        assert list(journal.items()) == list(records.items())
        assert len(journal) == 3
        assert "key 1" in journal
        assert "key 4" not in journal
        assert journal.get("key 2") == {"value": 2, "text": "ü\n"}


def test_second_record_of_a_key_changes_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        journal.put("a", 1)
        assert not journal.put("a", 2)
        assert journal.put_many({"a": 3, "b": 4}) == 1
        assert list(journal.items()) == [("a", 1), ("b", 4)]


def test_unknown_key_is_a_key_error(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal, pytest.raises(KeyError):
        journal.get("a")


def test_failed_write_leaves_the_journal_usable(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        with pytest.raises(TypeError):
            journal.put_many({"a": 1, "b": object()})
        journal._db.execute("PRAGMA query_only=ON")
        with pytest.raises(StorageError, match="cannot write"):
            journal.put("a", 1)
        journal._db.execute("PRAGMA query_only=OFF")
        assert journal.put("a", 2)
        assert list(journal.items()) == [("a", 2)]


def test_other_files_are_no_journals(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to look at" * 50, encoding="utf-8")
    with pytest.raises(StorageError, match="not a journal"):
        Journal(tmp_path / "text")
    with pytest.raises(StorageError, match="cannot open"):
        Journal(tmp_path / "nowhere" / "j.db")


WRITER = """
import sys
from pathlib import Path
from llavakit.storage.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    for i in range(len(journal), 10**6):
        journal.put(str(i), {"i": i})
        print(i, flush=True)
"""


def test_kills_lose_no_acknowledged_record(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "j.db")], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.03))
            writer.kill()
            acknowledged = [int(line) for line in writer.stdout if line.endswith("\n")]
        with Journal(tmp_path / "j.db") as journal:
            found = list(journal.items())
        assert found == [(str(i), {"i": i}) for i in range(len(found))]
        assert len(found) > max(acknowledged, default=0)
