"""llava data check: a table, examples, learned tokens in brackets, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from llavakit.cli.main import run
from tests.training_rows import ANSWER, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path]:
    return write_rows(tmp_path, 9)


def check(rows: tuple[Path, Path], *options: str) -> int:
    return run(["data", "check", str(rows[0]), "--images", str(rows[1]), *options])


def test_sound_rows_are_said_to_be(rows: tuple[Path, Path], capsys: Any) -> None:
    assert check(rows, "--strict", "--decode") == 0
    assert capsys.readouterr().out.startswith("9 of 9 rows can train, ")


def test_faults_are_listed_by_kind_and_strict_tells_by_its_code(rows: tuple[Path, Path], capsys: Any) -> None:
    (rows[1] / "0.png").unlink()
    (rows[1] / "1.png").write_bytes((rows[1] / "1.png").read_bytes()[:-30])
    values = json.loads(rows[0].read_text())
    values[2] = {"conversations": "?"}
    rows[0].write_text(json.dumps(values))
    assert check(rows) == 0
    printed = capsys.readouterr().out
    assert "7 of 9 rows can train" in printed
    assert "1  missing picture: a picture is not there" in printed
    assert "row 0: cannot read picture '0.png'" in printed
    assert "1  form: the row is of no known form" in printed
    assert check(rows, "--strict", "--decode", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["can_train"]) == (9, 6)  # the torn picture has a sound header
    assert {(fault["row"], fault["kind"]) for fault in found["faults"]} == {(0, "missing picture"), (1, "picture"), (2, "form")}


def test_learned_tokens_are_in_brackets(rows: tuple[Path, Path], capsys: Any) -> None:
    assert check(rows, "--show", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count("--- row") == 2
    assert f"[[{ANSWER}</s>]]" in printed.replace("[[ ", "[[")
    assert "<image>" in printed


def test_pairs_are_checked_as_pairs(rows: tuple[Path, Path], capsys: Any) -> None:
    pairs = [{"question": "what?", "chosen": "a", "rejected": "b"}, {"question": "what?", "chosen": "a", "rejected": "a"}]
    rows[0].write_text(json.dumps(pairs))
    assert check(rows, "--pairs", "--strict") == 1
    printed = capsys.readouterr().out
    assert "1 of 2 rows can train" in printed
    assert "1  pair: it is no pair, its two answers are the same" in printed


def test_a_document_and_shown_rows_exclude_each_other(rows: tuple[Path, Path]) -> None:
    assert check(rows, "--json", "--show", "1") == 2


def test_a_file_that_is_none_is_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rows.json").write_text("{")
    assert run(["data", "check", str(tmp_path / "rows.json")]) == 4
    assert capsys.readouterr().err.count("\n") == 1
