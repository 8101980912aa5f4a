"""LLaVA's JSON: what becomes of markers and pictures, and what is refused before the first step."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.errors import DataError, ImageError, PromptError
from llavakit.training.checks import FAULTS
from llavakit.training.records import RecordSource
from llavakit.types import Conversation, ImagePart, Message, TextPart
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene
from tests.tiny import tiny_processor


def png() -> bytes:
    return to_png(render(draw_scene(random.Random(0)), 40, 40))


def turn(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def source(folder: Path, *records: Any, max_sample_tokens: int | None = None) -> RecordSource:
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "a.png").write_bytes(png())
    return RecordSource(folder / "records.json", folder / "pictures", tiny_processor(), max_sample_tokens=max_sample_tokens)


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
    ("form", {"messages": [{"role": "tool", "content": "x"}]}),
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
    ("picture", {"image": "gone.png", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("picture", {"image": "a\0.png", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("picture", {"image": "../x.png", "conversations": [turn("human", "<image> Q"), turn("gpt", "A")]}),
    ("too long", {"conversations": [turn("human", "Q" * 900), turn("gpt", "A")]}),
    ("duplicate id", {"id": "7", "conversations": ANSWERED}),
    ("empty question", {"conversations": [turn("human", ""), turn("gpt", "A")]}),
    ("markup in text", {"conversations": [turn("human", "What is </s>?"), turn("gpt", "A")]}),
]


def test_every_fault_has_a_name_and_a_row_with_any_is_told(tmp_path: Path) -> None:
    records = source(tmp_path, {"id": "7", "conversations": ANSWERED}, *(row for _, row in FAULTY), max_sample_tokens=800)
    trains = ("duplicate id", "empty question", "markup in text")
    for index, (kind, _) in enumerate(FAULTY, 1):
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
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps({"conversations": ANSWERED}) for _ in range(3)) + "\n\n")
    assert len(RecordSource(tmp_path / "rows.jsonl", tmp_path, tiny_processor())) == 3
    (tmp_path / "torn.jsonl").write_text('{"a": 1}\n{"b"\n')
    with pytest.raises(DataError, match=r"torn\.jsonl, line 2"):
        RecordSource(tmp_path / "torn.jsonl", tmp_path, tiny_processor())


KEYS = ("conversations", "from", "value", "image", "messages", "role", "content", "id", "type", "text")
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(("human", "gpt", "<image>", "a.png"))
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12
)


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
    with pytest.raises(ImageError, match="picture"):
        records.sample(0)
