"""Writing the rows of a set: whole or not at all, everything that is left out counted."""

import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import DataError
from llavakit.storage.plain_pickle import read_plain_pickle
from llavakit.training.prepare.published import LeftOut, coco_picture, read_published, talk, write_rows
from llavakit.training.rows import open_rows

ROWS = [talk("1", "a.jpg", [("Q1", "A1"), ("Q2", "A2")]), talk("2", None, [("Q", "Ü")]), talk("3", "b.jpg", [("Q", "A")])]


@pytest.mark.parametrize("name", ["deep/rows.json", "rows.jsonl"])
def test_rows_are_written_and_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    written = write_rows([*ROWS, LeftOut("odd"), LeftOut("odd")], tmp_path / name, tmp_path)
    rows = open_rows(tmp_path / name)
    assert [rows.row(index) for index in range(len(rows))] == ROWS[:2]
    assert (written.num_rows, written.num_with_pictures) == (2, 1)
    assert written.left_out == {"odd": 2, "without their picture": 1}
    assert ROWS[0]["conversations"][0] == {"from": "human", "value": "<image>\nQ1"}
    assert ROWS[0]["conversations"][2] == {"from": "human", "value": "Q2"}


def test_a_set_that_breaks_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[1]")

    def broken() -> Iterator[Any]:
        yield ROWS[0]
        raise KeyError("image_id")

    with pytest.raises(DataError, match="form in which it was published: KeyError"):
        write_rows(broken(), tmp_path / "rows.json")
    with pytest.raises(DataError, match="no row is left"):
        write_rows([LeftOut("odd")], tmp_path / "rows.json")
    with pytest.raises(DataError, match="cannot write"):
        write_rows(ROWS, tmp_path / "rows.json" / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert (tmp_path / "rows.json").read_text() == "[1]"


def test_pictures_of_coco_have_twelve_digits() -> None:
    assert coco_picture(33471) == coco_picture("000000033471") == "coco/train2017/000000033471.jpg"


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_files_of_another_form_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        read_published(tmp_path / "x.json")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/llavakit-was-here", "w"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read_and_nothing_in_them_is_called(tmp_path: Path, protocol: int) -> None:
    value = [{"sentences": [{"sent": "a dög"}], "ref_id": 7, "box": [1.5, -2, None, True], "tuple": (1, (2,))}]
    (tmp_path / "a.p").write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(tmp_path / "a.p") == value
    (tmp_path / "b.p").write_bytes(pickle.dumps([Harmful()], protocol))
    with pytest.raises(DataError, match="only plain values"):
        read_plain_pickle(tmp_path / "b.p")
    assert not Path("/tmp/llavakit-was-here").exists()


def test_damaged_pickles_are_refused_or_read(tmp_path: Path) -> None:
    data = pickle.dumps([{"sent": "a dog", "id": n} for n in range(5)], 2)
    rng = random.Random(0)
    for _ in range(400):
        changed = bytearray(data[: rng.randrange(1, len(data) + 1)])
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        (tmp_path / "x.p").write_bytes(changed)
        try:
            json.dumps(repr(read_plain_pickle(tmp_path / "x.p")))
        except DataError:
            continue
