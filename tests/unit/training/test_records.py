"""LLaVA's JSON: what becomes of markers and pictures, and what is refused before the first step."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import DataError
from llavakit.training.records import RecordSource
from llavakit.types import Conversation, ImagePart, Message, TextPart
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene
from tests.tiny import tiny_processor


def png() -> bytes:
    return to_png(render(draw_scene(random.Random(0)), 40, 40))


def turn(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def source(folder: Path, *records: Any) -> RecordSource:
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "a.png").write_bytes(png())
    return RecordSource(folder / "records.json", folder / "pictures", tiny_processor())


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


def test_all_bad_records_are_listed_before_the_first_step(tmp_path: Path) -> None:
    answer = [turn("human", "Q"), turn("gpt", "A")]
    bad: list[Any] = [
        7,
        {"conversations": []},
        {"conversations": [turn("human", "Q")]},
        {"conversations": [turn("robot", "Q")]},
        {"conversations": [turn("human", "Q"), turn("human", "Q")]},
        {"image": "a.png", "conversations": answer},
        {"conversations": [turn("human", "<image> Q"), turn("gpt", "A")]},
        {"image": 3, "conversations": answer},
    ]
    with pytest.raises(DataError) as caught:
        source(tmp_path, {"conversations": answer}, *bad)
    message = str(caught.value)
    assert "8 records" in message
    assert all(f"record {index}:" in message for index in range(1, 9))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "missing.png"])
def test_pictures_come_from_their_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    records = source(tmp_path, {"image": name, "conversations": [turn("human", "<image>\nQ"), turn("gpt", "A")]})
    with pytest.raises(DataError, match="picture"):
        records.sample(0)
