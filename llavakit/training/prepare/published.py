"""What every published set needs: reading its files, the rows that it becomes, and writing them.

Owns: read_published, talk, coco_picture, LETTER_PROMPT, write_rows and its Written. Refuses: knowing any set.
Invariant: the file of rows appears whole or not at all, and whatever is left out is counted by reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.storage.folder import atomic_file
from llavakit.training.rows import Rows

__all__ = ["LETTER_PROMPT", "LeftOut", "Row", "Written", "coco_picture", "listed", "read_published", "row_or_none", "talk", "write_rows"]

Row = dict[str, Any]
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
"""How LLaVA-1.5 asks for a choice."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that a set could not give, and why."""

    reason: str


@dataclass(slots=True)
class Written:
    """What became of a set."""

    num_rows: int = 0
    num_with_pictures: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that are not in the file, by reason."""


def read_published(path: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds a table, or a list. Raises: DataError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} must hold a {kind.__name__}, got a {type(value).__name__}; is it the file that is named there?")
    return value


def listed(table: Any, key: str, path: Path) -> list[Any]:
    """Return a list of a published table. Raises: DataError."""
    value = table.get(key) if isinstance(table, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{path} must hold a list {key!r}; is it the file that is named there?")
    return value


def row_or_none(rows: Rows, number: int) -> Any:
    """Read a row; None where it is no JSON."""
    try:
        return rows.row(number)
    except DataError:
        return None


def talk(name: str, image: str | None, exchanges: Sequence[tuple[str, str]]) -> Row:
    """Build a row of questions and answers about one picture, or about none; the mark stands before the first question."""
    turns = [{"from": speaker, "value": text} for exchange in exchanges for speaker, text in zip(("human", "gpt"), exchange, strict=True)]
    if image is None:
        return {"id": name, "conversations": turns}
    turns[0] = {**turns[0], "value": f"<image>\n{turns[0]['value']}"}
    return {"id": name, "image": image, "conversations": turns}


def coco_picture(number: int | str) -> str:
    """Name a picture of COCO as train2017 has it, which holds all of train2014."""
    return f"coco/train2017/{int(number):012d}.jpg"


def write_rows(rows: Iterable[Row | LeftOut], output: Path, images: Path | None = None) -> Written:
    """Write rows as a JSON list, or one a line where output ends in .jsonl; with images, those whose picture is there.

    Raises: DataError where nothing is left, the set is not as it was published, or the file cannot be written.
    """
    if output.suffix not in (".json", ".jsonl"):
        raise DataError(f"rows are written as .json or .jsonl, got {output}")
    written, is_lines = Written(), output.suffix == ".jsonl"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            file.write("" if is_lines else "[")
            for row in _kept(rows, images, written):
                file.write(("\n" if is_lines else ",\n") if written.num_rows else "" if is_lines else "\n")
                file.write(json.dumps(row, ensure_ascii=False))
                written.num_rows += 1
                written.num_with_pictures += "image" in row
            file.write("\n" if is_lines else "\n]\n")
            if written.num_rows == 0:
                reasons = ", ".join(f"{count} {reason}" for reason, count in written.left_out.items())
                raise DataError(f"no row is left to write ({reasons or 'the set is empty'})")
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DataError(f"the set is not in the form in which it was published: {error!r} after {written.num_rows} rows") from error
    return written


def _kept(rows: Iterable[Row | LeftOut], images: Path | None, written: Written) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, LeftOut):
            written.left_out[row.reason] += 1
        elif images is not None and "image" in row and not (images / row["image"]).is_file():
            written.left_out["without their picture"] += 1
        else:
            yield row
