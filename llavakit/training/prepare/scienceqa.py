"""ScienceQA: school questions with choices, a lecture and a solution.

Owns: scienceqa_rows. Rows are those of LLaVA's scripts/convert_sqa_to_llava.py, to the character; CQM-A is the form of LLaVA-1.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.training.prepare.published import LETTER_PROMPT, LeftOut, Row, listed, read_published

__all__ = ["FORMS", "scienceqa_rows"]

_LETTERS = "ABCDE"
FORMS = ("QCM-LEA", "QCM-LEPA", "QCM-ALE", "QCM-A", "CQM-A")
"""Question, context, multiple choices; then answer, lecture, explanation in this order (P: the answer stands behind ###)."""


def scienceqa_rows(folder: Path, *, split: str = "train", form: str = "QCM-LEA") -> Iterator[Row | LeftOut]:
    """Read problems.json and pid_splits.json; pictures are PID/image.png. Raises: DataError."""
    if form not in FORMS:
        raise DataError(f"there is no form {form!r} of ScienceQA; there are {', '.join(FORMS)}")
    problems, splits = read_published(folder / "problems.json"), folder / "pid_splits.json"
    for name in listed(read_published(splits), split, splits):
        if not isinstance(problem := problems.get(name), dict):
            yield LeftOut("without a problem")
            continue
        try:
            yield _row(str(name), problem, form)
        except (KeyError, TypeError, IndexError, AttributeError):
            yield LeftOut("of another form")


def _row(name: str, problem: Mapping[str, Any], form: str) -> Row:
    answer = _LETTERS[problem["answer"]]
    question, reply = (_asked_plainly(problem), answer) if form == "CQM-A" else (_asked(problem), _reply(problem, answer, form))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    if problem["image"] is None:
        return {"id": name, "conversations": turns}
    # The mark stands where LLaVA's script puts it; training moves it to the front.
    turns[0]["value"] = f"<image>\n{question}" if form == "CQM-A" else f"{question}\n<image>"
    return {"id": name, "image": f"{name}/{problem['image']}", "conversations": turns}


def _asked(problem: Mapping[str, Any]) -> str:
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, problem["choices"], strict=False))
    context = problem["hint"].strip() or "N/A"
    text = f"Question: {problem['question']}\nContext: {context}\nOptions: {choices}\n"
    return text.replace("  ", " ").strip().replace("Question: ", "")


def _asked_plainly(problem: Mapping[str, Any]) -> str:
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, problem["choices"], strict=False))
    return f"{context}{problem['question']}\n{choices}{LETTER_PROMPT}"


def _reply(problem: Mapping[str, Any], answer: str, form: str) -> str:
    lecture, solution = (problem[key].replace("\\n", "\n") for key in ("lecture", "solution"))
    match form:
        case "QCM-LEA":
            text = f"Answer: {lecture} {solution} The answer is {answer}."
        case "QCM-ALE":
            text = f"Answer: The answer is {answer}. BECAUSE: {lecture} {solution}"
        case "QCM-A":
            text = f"Answer: The answer is {answer}."
        case _:
            parts = [f"{title}: {part}\n" for title, part in (("LECTURE", lecture), ("SOLUTION", solution)) if part.strip()]
            text = f"{''.join(parts)}###\nANSWER: {answer}."
    text = text.replace("  ", " ").strip()
    text = text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text
    return text.replace("Answer: ", "") if text.startswith("Answer: ") else text
