"""Rows of instruction data: what becomes of marks and pictures, and what is refused before the first step."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llavakit.errors import CheckpointError, DataError, ImageError, PromptError
from llavakit.training.checks import FAULTS
from llavakit.training.forms import row_of
from llavakit.training.pictures import PictureFolder, open_pictures
from llavakit.training.records import RecordSource
from llavakit.training.rows import open_rows
from llavakit.types import Conversation, ImagePart, Message, TextPart
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene
from tests.odd_rows import ODD, Held, with_one_place_replaced
from tests.tiny import tiny_processor


def png() -> bytes:
    return to_png(render(draw_scene(random.Random(0)), 40, 40))


def turn(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def source(folder: Path, *records: Any, max_sample_tokens: int | None = None) -> RecordSource:
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "a.png").write_bytes(png())
    rows, pictures = open_rows(folder / "records.json"), open_pictures(folder / "pictures")
    return RecordSource(rows, pictures, tiny_processor(), max_sample_tokens=max_sample_tokens)


def test_a_record_is_the_conversation_it_spells(tmp_path: Path) -> None:
    turns = [turn("human", "What is it?\n<image>"), turn("gpt", "A dot."), turn("human", "Sure?"), turn("gpt", "Yes.")]
    sample = source(tmp_path, {"id": "1", "image": "a.png", "conversations": turns}).sample(0)
    expected = tiny_processor().prompt(
        Conversation(
            (
                Message("user", (ImagePart(png()), TextPart("What is it?"))),
                Message("assistant", (TextPart("A dot."),)),
                Message("user", (TextPart("Sure?"),)),
                Message("assistant", (TextPart("Yes."),)),
            )
        ),
        add_generation_prompt=False,
    )
    assert sample.ids == expected.ids
    assert sample.loss_mask == expected.loss_mask
    assert sample.tiles_N3SS.equal(expected.tiles_N3SS)


def test_a_first_turn_of_the_model_is_dropped(tmp_path: Path) -> None:
    turns = [turn("gpt", "Hi!"), turn("human", "Who?"), turn("gpt", "Me.")]
    records = source(tmp_path, {"conversations": turns}, {"conversations": turns[1:]})
    assert records.sample(0).ids == records.sample(1).ids


def test_lengths_are_known_from_headers_and_a_missing_picture_is_told(tmp_path: Path) -> None:
    records = source(
        tmp_path,
        {"image": "a.png", "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "A dot.")]},
        {"conversations": [turn("human", "What?"), turn("gpt", "Nothing.")]},
    )
    expected = [len(records.sample(index).ids) for index in range(len(records))]
    picture = tmp_path / "pictures" / "a.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    assert [records.measure(index).num_tokens for index in range(len(records))] == expected
    picture.unlink()
    assert "a.png" in records.measure(0).problems[0].message


ANSWERED = [turn("human", "Q"), turn("gpt", "A")]
FAULTY: list[tuple[str, Any]] = [
    ("form", 7),
    ("form", {"id": "1"}),
    ("turn", {"messages": [{"role": "tool", "content": "x"}]}),
    ("turn", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
    ("turn", {"messages": [{"role": "assistant", "content": [{"type": "image", "path": "a.png"}]}]}),
    ("turn", {"texts": [{"user": "Q"}]}),
    ("no answer", {"conversations": []}),
    ("no answer", {"conversations": [turn("human", "Q")]}),
    ("no answer", {"conversations": [turn("gpt", "A")]}),
    ("turn", {"conversations": [turn("robot", "Q")]}),
    ("turn", {"conversations": [{"from": "human", "value": 3}]}),
    ("order", {"conversations": [*ANSWERED, turn("gpt", "A")]}),
    ("marks", {"image": "a.png", "conversations": ANSWERED}),
    ("marks", {"conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("picture name", {"image": 3, "conversations": ANSWERED}),
    ("empty answer", {"conversations": [turn("human", "Q"), turn("gpt", " ")]}),
    ("missing picture", {"image": "gone.png", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("missing picture", {"image": "a\0.png", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("missing picture", {"image": "../x.png", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("picture", {"image": "torn.png", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("animated picture", {"image": "moving.gif", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("too long", {"conversations": [turn("human", "Q" * 900), turn("gpt", "A")]}),
    ("empty question", {"conversations": [turn("human", ""), turn("gpt", "A")]}),
    ("no last answer", {"conversations": [*ANSWERED, turn("human", "Q")]}),
    ("opening answer", {"conversations": [turn("gpt", "Hi!"), *ANSWERED]}),
    ("markup in text", {"conversations": [turn("human", "What is </s>?"), turn("gpt", "A")]}),
]


def test_every_fault_has_a_name_and_a_row_with_any_is_told(tmp_path: Path) -> None:
    records = source(tmp_path, *(row for _, row in FAULTY), max_sample_tokens=800)
    (tmp_path / "pictures" / "torn.png").write_bytes(png()[:20])
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "pictures" / "moving.gif", save_all=True, append_images=frames[1:])
    trains = ("empty question", "markup in text", "no last answer", "opening answer")
    for index, (kind, _) in enumerate(FAULTY):
        measured = records.measure(index)
        assert [problem.kind for problem in measured.problems] == [kind], (index, measured)
        assert measured.problems[0].is_fatal == (kind not in trains)
        assert kind in FAULTS
        if kind not in (*trains, "too long"):
            with pytest.raises((DataError, PromptError, ImageError)):
                records.sample(index)


def test_messages_and_lines_are_read_too(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A dot."},
    ]
    turns = [turn("system", "Be short."), turn("human", "<image>\nWhat?"), turn("gpt", "A dot.")]
    records = source(tmp_path, {"images": ["a.png"], "messages": messages}, {"image": "a.png", "conversations": turns})
    assert records.sample(0).ids == records.sample(1).ids


def spelled(value: Any) -> list[tuple[str, tuple[str | None, ...]]]:
    return [(turn.role, turn.parts) for turn in row_of(value)[0].turns]


def test_one_picture_comes_first_and_several_keep_their_places() -> None:
    def asked(text: str, *pictures: str) -> list[tuple[str, tuple[str | None, ...]]]:
        return spelled({"image": list(pictures), "conversations": [turn("human", text), turn("gpt", "A")]})[:1]

    assert asked("What is it? \n<image>", "a") == [("user", (None, "What is it?"))]
    assert asked("<image>\n<image>\nSame?", "a", "b") == [("user", (None, None, "Same?"))]
    assert asked("Is <image> like <image>?", "a", "b") == [("user", ("Is ", None, " like ", None, "?"))]
    assert asked("<image>\nand <image>", "a", "b") == [("user", (None, "and ", None))]
    assert asked("<image><image>", "a", "b") == [("user", (None, None))]


@pytest.mark.catalogue("D4")
def test_of_typed_content_only_the_pictures_are_pictures(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "A"}
    text = {"type": "text", "text": "What does <image> mean?", "index": None}
    assert spelled({"messages": [{"role": "user", "content": [text]}, answer]})[0] == ("user", ("What does <image> mean?",))
    named = {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, text]}, answer]}
    numbered = [{"type": "image", "index": 1}, text, {"type": "image", "index": 0}]
    assert row_of(named)[0].pictures == ("a.png",)
    row, _ = row_of({"images": ["a", b"b"], "messages": [{"role": "user", "content": numbered}, answer]})
    assert row.pictures == (b"b", "a")
    assert row.turns[0].parts == (None, "What does <image> mean?", None)
    unmarked, _ = row_of({"images": ["a"], "messages": [{"role": "user", "content": "What?"}, answer]})
    assert unmarked.turns[0].parts == (None, "What?")
    spelled_there = source(tmp_path, {"messages": [{"role": "user", "content": [text]}, answer]}).measure(0)
    assert [problem.kind for problem in spelled_there.problems] == ["markup in text"]


def test_a_mark_without_a_picture_is_text_inside_and_a_fault_at_an_end() -> None:
    assert spelled({"conversations": [turn("human", "What does <image> mean?"), turn("gpt", "A picture.")]})[0][1] == (
        "What does <image> mean?",
    )
    for text in ("<image>\nWhat?", "What?\n<image>"):
        with pytest.raises(DataError, match="1 <image> marks but 0 pictures"):
            spelled({"conversations": [turn("human", text), turn("gpt", "A")]})


def test_links_inside_of_the_folder_may_lead_out(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").write_bytes(png())
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "coco").symlink_to(tmp_path / "disk")
    folder = PictureFolder(tmp_path / "pictures")
    assert (
        folder.read("coco/a.png")
        == folder.read("coco/../coco/a.png")
        == folder.read(str(tmp_path / "pictures" / "coco" / "a.png"))
        == png()
    )
    for name in ("../disk/a.png", str(tmp_path / "disk" / "a.png"), "coco", ""):
        with pytest.raises(DataError):
            folder.read(name)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match="bytes, at most"):
        PictureFolder(tmp_path).read("huge.png")


def test_pixels_of_all_pictures_are_counted_before_training(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("1", (4000, 3000)).save(tmp_path / "pictures" / "large.png")
    row = {"image": ["large.png"] * 3, "conversations": [turn("human", "<image><image><image>"), turn("gpt", "A")]}
    measured = source(tmp_path, row).measure(0)
    assert [fault.kind for fault in measured.problems] == ["picture"]


def test_a_template_that_the_tokenizer_lacks_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks"):
        RecordSource(Held({}), PictureFolder(tmp_path), tiny_processor("qwen"))


def test_exchanges_of_the_cauldron_are_turns() -> None:
    exchanges = [{"user": "Q1", "assistant": "A1", "source": "x"}, {"user": "Q2", "assistant": "A2", "source": "x"}]
    row, _ = row_of({"images": [b"png"], "texts": exchanges})
    assert [turn.parts for turn in row.turns] == [(None, "Q1"), ("A1",), ("Q2",), ("A2",)]


def test_pictures_in_the_row_are_the_same_as_pictures_by_name() -> None:
    turns = [turn("human", "<image>\nQ"), turn("gpt", "A")]
    files = PictureFolder(Path("."))
    held = Held({"image": png(), "conversations": turns})
    source = RecordSource(held, files, tiny_processor())
    assert source.sample(0).tiles_N3SS.shape[0] == 1
    assert source.measure(0).num_tokens == source.sample(0).num_tokens
    torn = RecordSource(Held({"image": png()[:20], "conversations": turns}), files, tiny_processor()).measure(0)
    assert torn.problems[0].message.startswith("picture 1 of the row:")


KEYS = ("conversations", "from", "value", "image", "messages", "role", "content", "id", "type", "text")
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(("human", "gpt", "<image>", "a.png"))
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12
)


VALID: tuple[dict[str, Any], ...] = (
    {"id": "1", "image": "a.png", "conversations": [turn("human", "<image>\nQ"), turn("gpt", "A"), turn("human", "Q"), turn("gpt", "B")]},
    {
        "images": ["a.png"],
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": "A"},
        ],
    },
    {"images": ["a.png"], "texts": [{"user": "Q", "assistant": "A"}]},
)


def test_any_value_at_any_place_is_measured() -> None:
    values = [other for value in VALID for odd in ODD for other in with_one_place_replaced(value, odd)]
    records = RecordSource(Held(*values), PictureFolder(Path("nowhere")), tiny_processor())
    for index, value in enumerate(values):
        measured = records.measure(index)
        assert measured.num_tokens > 0 or not measured.is_usable, value
        json.dumps(measured.id)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_json_is_measured(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measured = source(Path(folder), value).measure(0)
    assert measured.num_tokens > 0 or any(problem.is_fatal for problem in measured.problems)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "missing.png"])
def test_pictures_come_from_their_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    records = source(tmp_path, {"image": name, "conversations": [turn("human", "<image>\nQ"), turn("gpt", "A")]})
    with pytest.raises(DataError, match="picture"):
        records.sample(0)
