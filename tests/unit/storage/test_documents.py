"""storage.documents: small files, read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavakit.errors import CheckpointError
from llavakit.storage.documents import read_json, read_optional_json, read_text, write_json


def test_tables_round_trip(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None, True], "ü": {"b": "</s>\n"}}
    write_json(tmp_path / "x.json", values)
    assert read_json(tmp_path / "x.json") == values


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", '{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_anything_but_a_clean_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_missing_file(tmp_path: Path) -> None:
    assert read_optional_json(tmp_path / "x.json") == {}
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path / "x.json")


def test_bytes_that_are_not_utf8_and_huge_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_text(tmp_path / "x")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(CheckpointError, match="larger than"):
        read_text(tmp_path / "huge")
