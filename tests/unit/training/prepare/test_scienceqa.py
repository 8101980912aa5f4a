"""ScienceQA's rows, to the character of LLaVA's script."""

import json
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import DataError
from llavakit.training.prepare.published import LeftOut
from llavakit.training.prepare.scienceqa import FORMS, scienceqa_rows

PROBLEM: dict[str, Any] = {
    "question": "Which is  farther north?", "choices": ["Oregon", "Utah"], "answer": 0, "hint": "", "image": "image.png",
    "lecture": "Maps have four directions.\\nNorth is up.", "solution": "Look at the compass rose.",
}  # fmt: skip
BARE = {**PROBLEM, "image": None, "hint": "Use the table.", "lecture": "", "solution": "", "answer": 1}


def rows(folder: Path, form: str, **problems: Any) -> list[Any]:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(problems), "test": []}))
    return list(scienceqa_rows(folder, form=form))


def said(row: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


ASKED = "Which is farther north?\nContext: N/A\nOptions: (A) Oregon (B) Utah"
EXPECTED = {
    "QCM-LEA": "Maps have four directions.\nNorth is up. Look at the compass rose. The answer is A.",
    "QCM-LEPA": "LECTURE: Maps have four directions.\nNorth is up.\nSOLUTION: Look at the compass rose.\n###\nANSWER: A.",
    "QCM-ALE": "The answer is A. BECAUSE: Maps have four directions.\nNorth is up. Look at the compass rose.",
    "QCM-A": "The answer is A.",
}


@pytest.mark.parametrize("form", EXPECTED)
def test_a_problem_is_the_row_of_the_script(tmp_path: Path, form: str) -> None:
    found, bare = rows(tmp_path, form, **{"1": PROBLEM, "2": BARE})
    assert found["id"] == "1"
    assert found["image"] == "1/image.png"
    assert said(found) == [f"{ASKED}\n<image>", EXPECTED[form]]
    assert "image" not in bare
    assert said(bare)[0] == "Which is farther north?\nContext: Use the table.\nOptions: (A) Oregon (B) Utah"


def test_what_is_not_there_leaves_what_the_script_leaves(tmp_path: Path) -> None:
    assert said(rows(tmp_path, "QCM-LEA", **{"2": BARE})[0])[1] == " The answer is B."
    assert said(rows(tmp_path, "QCM-LEPA", **{"2": BARE})[0])[1] == "###\nANSWER: B."
    assert said(rows(tmp_path, "QCM-ALE", **{"2": BARE})[0])[1] == "The answer is B."


def test_letters_alone_are_asked_for_as_in_version_one_and_a_half(tmp_path: Path) -> None:
    found, bare = rows(tmp_path, "CQM-A", **{"1": PROBLEM, "2": BARE})
    prompt = "Answer with the option's letter from the given choices directly."
    assert said(found) == [f"<image>\nWhich is  farther north?\nA. Oregon\nB. Utah\n{prompt}", "A"]
    assert said(bare) == [f"Context: Use the table.\nWhich is  farther north?\nA. Oregon\nB. Utah\n{prompt}", "B"]


def test_problems_that_are_none_are_left_out(tmp_path: Path) -> None:
    found = rows(tmp_path, "QCM-A", **{"1": {**PROBLEM, "answer": 9}, "2": {}, "3": 7, "4": PROBLEM})
    assert found[:3] == [LeftOut("of another form"), LeftOut("of another form"), LeftOut("without a problem")]
    with pytest.raises(DataError, match="no form 'X'"):
        rows(tmp_path, "X")
    with pytest.raises(DataError, match="must hold a list 'val'"):
        list(scienceqa_rows(tmp_path, split="val", form=FORMS[0]))
