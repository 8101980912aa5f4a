"""Rows in files: JSON of any writing, archives, data sets; one row at a time, and what is no file of rows."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.training.pictures import open_pictures
from llavakit.training.records import RecordSource
from llavakit.training.rows import Rows, open_rows
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene
from tests.tiny import tiny_processor
from tests.unit.storage.test_tar import write_tar

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}]


def png(seed: int = 0) -> bytes:
    return to_png(render(draw_scene(random.Random(seed)), 40, 40))


def all_of(rows: Rows) -> list[Any]:
    return [rows.row(index) for index in range(len(rows))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=5), st.booleans(), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_any_list_of_json_is_read_row_by_row(tmp_path_factory: Any, values: list[Any], is_ascii: bool, indent: Any, has_mark: bool) -> None:
    folder = tmp_path_factory.mktemp("rows")
    start = "\ufeff" if has_mark else ""
    whole = json.dumps(values, ensure_ascii=is_ascii, indent=indent)
    lines = "\r\n\n".join(json.dumps(value, ensure_ascii=is_ascii) for value in values)
    for name, text in (("a.json", whole), ("a.jsonl", lines)):
        try:
            (folder / name).write_bytes((start + text + "\n").encode())
        except UnicodeEncodeError:  # half of a surrogate pair cannot be written unescaped
            continue
        assert all_of(open_rows(folder / name)) == values


def test_the_same_rows_have_the_same_digest(tmp_path: Path) -> None:
    for name, rows in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    first, second, third = (open_rows(tmp_path / f"{name}.json").digest for name in "abc")
    assert first == second != third


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[]",
        "{}",
        '{"a": [1]}',
        "7",
        '[{"a": 1}',
        '[{"a": "b]',
        "[1]]",
        "[1] [2]",
        "[1] x",
        "x [1]",
        "[1]}",
        ']["a"]',
        '"[1]"',
        "}{",
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=r"rows\.json"):
        open_rows(tmp_path / "rows.json")


def test_a_list_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    text = json.dumps([{"id": "1", "conversations": [{"from": "human", "value": 'a "]" \\'}]}, [2, "]"]])
    for end in range(len(text)):
        (tmp_path / "rows.json").write_text(text[:end])
        with pytest.raises(DataError, match=r"rows\.json"):
            open_rows(tmp_path / "rows.json")


def test_a_row_that_is_no_json_is_its_own_fault(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"b"\n\xff\n' + b"[" * 100_000 + b'\n"\xe2\x80\xa8"\n')
    rows = open_rows(tmp_path / "rows.jsonl")
    assert rows.row(0) == {"a": 1}
    assert rows.row(4) == "\u2028"
    for index in (1, 2, 3):
        with pytest.raises(DataError, match="no JSON"):
            rows.row(index)
    (tmp_path / "rows.json").write_text("[1, {'b': 2}, 3]")
    with pytest.raises(DataError, match="no JSON"):
        open_rows(tmp_path / "rows.json").row(1)


@pytest.mark.parametrize("name", ["gone.json", "gone.jsonl", "gone-*.tar", "gone", "gone.parquet", "no/such/place"])
def test_what_is_not_there_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"gone|place"):
        open_rows(str(tmp_path / name))


def test_files_of_an_archive_make_rows(tmp_path: Path) -> None:
    files = {
        "0/a.jpg": png(1),
        "0/a.json": json.dumps({"conversations": TURNS, "image": "lost.jpg"}).encode(),
        "0/b.0.png": png(2),
        "0/b.1.png": png(3),
        "0/b.txt": b"Two pictures.\n",
        "0/c.json": json.dumps({"caption": "x", "url": "y"}).encode(),
        "0/d.png": png(4),
        "0/e.json": b"{",
        "0/e.cls": b"3",
    }
    write_tar(tmp_path / "0.tar", files)
    write_tar(tmp_path / "1.tar", {"a.png": png(5), "a.txt": b"One.", "a.json": b'{"url": "y"}'})
    rows = open_rows(str(tmp_path / "*.tar"))
    assert len(rows) == 5
    assert rows.row(0) == {"conversations": TURNS, "image": [png(1)]}
    assert rows.row(1)["image"] == [png(2), png(3)]
    assert rows.row(1)["conversations"][1] == {"from": "gpt", "value": "Two pictures."}
    assert rows.row(4)["conversations"][1] == {"from": "gpt", "value": "One."}
    with pytest.raises(DataError, match="no JSON"):
        rows.row(3)
    source = RecordSource(rows, open_pictures(None), tiny_processor())
    assert [source.measure(index).is_usable for index in range(5)] == [True, True, False, False, True]
    write_tar(tmp_path / "empty.tar", {"a.png": png()})
    with pytest.raises(DataError, match="holds no rows"):
        open_rows(str(tmp_path / "empty.tar"))


def test_files_of_a_row_need_not_lie_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    apart = {f"{n}.png": png(n) for n in range(3)} | {f"{n}.txt": f"caption {n}".encode() for n in range(3)}
    write_tar(tmp_path / "a.tar", {**apart, "._0.txt": b"\0\1", "._0.png": b"x", "lost.png": png(9), "alone.txt": b"words"})
    rows = open_rows(tmp_path / "a.tar")
    assert [rows.row(n)["conversations"][1]["value"] for n in range(3)] == [f"caption {n}" for n in range(3)]
    assert [rows.row(n)["image"] for n in range(3)] == [[png(n)] for n in range(3)]
    assert "1 groups of files have neither" in caplog.text
    assert len(rows) == 4
    with pytest.raises(DataError, match="no picture beside it"):
        rows.row(3)


def test_pictures_of_a_row_are_in_its_order(tmp_path: Path) -> None:
    numbers = (0, 1, 10, 2, 9)
    named = json.dumps({"image": [f"a/7.{n}.png" for n in sorted(numbers)], "conversations": TURNS}).encode()
    files = {f"7.{n}.png": png(n) for n in numbers} | {"7.json": named, "7.meta.json": b"{}", "7.mask.png": png(99)}
    unnamed = {f"8.{n}.png": png(n) for n in numbers} | {"8.json": json.dumps({"texts": [{"user": "Q", "assistant": "A"}]}).encode()}
    write_tar(tmp_path / "a.tar", {**files, **unnamed, "8.mask.png": png(99)})
    rows = open_rows(tmp_path / "a.tar")
    assert rows.row(0)["image"] == rows.row(1)["image"] == [png(n) for n in sorted(numbers)]
    assert rows.row(1)["texts"] == [{"user": "Q", "assistant": "A"}]


def test_pictures_come_from_archives_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"./x/a.png": png(1), "twice.png": png(2)})
    write_tar(tmp_path / "1.tar", {"b.png": png(3), "twice.png": png(2)})
    pictures = open_pictures(str(tmp_path / "*.tar"))
    assert (pictures.read("x/a.png"), pictures.read("./b.png")) == (png(1), png(3))
    with pytest.raises(DataError, match="several files"):
        pictures.read("twice.png")
    with pytest.raises(DataError, match="no such file"):
        pictures.read("c.png")


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> datasets.Dataset:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    content = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "A dot.", "index": None}]}]
    rows = [{"messages": talk, "images": [{"bytes": png(seed), "path": None}]} for seed in range(3)]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("form", ["parquet", "folder of parquet", "saved", "saved splits"])
def test_data_sets_hold_rows_and_pictures(tmp_path: Path, dataset: datasets.Dataset, form: str) -> None:
    place = tmp_path / "set"
    match form:
        case "parquet":
            place = tmp_path / "set.parquet"
            dataset.to_parquet(place)
        case "folder of parquet":
            place.mkdir()
            dataset.to_parquet(place / "train-00000-of-00001.parquet")
        case "saved":
            dataset.save_to_disk(place)
        case _:
            datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(place)
    rows = open_rows(place)
    assert len(rows) == 3
    assert rows.row(1)["images"] == [png(1)]
    source = RecordSource(rows, open_pictures(None), tiny_processor())
    expected = {"image": "1.png", "conversations": TURNS}
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "rows.json").write_text(json.dumps([expected]))
    by_name = RecordSource(open_rows(tmp_path / "rows.json"), open_pictures(tmp_path), tiny_processor())
    assert source.sample(1).ids == by_name.sample(0).ids
    assert source.sample(1).tiles_N3SS.equal(by_name.sample(0).tiles_N3SS)


def test_a_split_that_is_not_there_is_told(tmp_path: Path, dataset: datasets.Dataset) -> None:
    dataset.to_parquet(tmp_path / "set.parquet")
    with pytest.raises(DataError, match="split test"):
        open_rows(tmp_path / "set.parquet", split="test")


def test_without_the_package_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"llavakit\[data\]"):
        open_rows(tmp_path)
