"""LLaVA-1.5's mixture: each of its sets, in little and in its publisher's form."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import DataError
from llavakit.training.forms import row_of
from llavakit.training.prepare import questions as questions_module
from llavakit.training.prepare.mix665k import PARTS, mixed_rows
from llavakit.training.prepare.published import LeftOut
from llavakit.training.prepare.regions import _square

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
VQA_QUESTIONS = {"questions": [{"question_id": n, "image_id": 9 if n < 3 else 10, "question": f"q{n}?"} for n in (1, 2, 3, 4)]}
BOOK = {"split": 1, "questions": ["Who wrote it?", "Is it a guide?"], "answers": ["Eve", "No"]}
REFERENCES = [
    {"split": "train", "ann_id": 5, "image_id": 9, "sentences": [{"sent": f"dog {n}"} for n in range(12)]},
    {"split": "val", "ann_id": 5, "image_id": 9, "sentences": [{"sent": "held out"}]},
    {"split": "train", "ann_id": 6, "image_id": 9, "sentences": [{"sent": "lost"}]},
]
INSTANCES = {"images": [{"id": 9, "width": 200, "height": 100}], "annotations": [{"id": 5, "bbox": [20, 10, 100, 50]}]}
SHARED = [
    {"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 4},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
    {"conversations": [{"from": "human", "value": "a" * 50}, {"from": "gpt", "value": "b"}]},
    {"conversations": []},
    {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]},
]
FILES: dict[str, Any] = {
    "llava_instruct_150k.json": [
        {"id": "lost", "conversations": []},
        {
            "id": "x",
            "image": "000000033471.jpg",
            "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
        },
    ],
    "sharegpt.json": SHARED,
    "vqav2/v2_OpenEnded_mscoco_train2014_questions.json": VQA_QUESTIONS,
    "vqav2/v2_mscoco_train2014_annotations.json": {
        "annotations": [{"question_id": n, "multiple_choice_answer": f"a{n}", "answers": []} for n in (1, 2, 3)]
    },
    "gqa/train_balanced_questions.json": {str(n): {"imageId": "77", "question": f"q{n}?", "answer": f"a{n}"} for n in range(3)},
    "okvqa/OpenEnded_mscoco_train2014_questions.json": VQA_QUESTIONS,
    "okvqa/mscoco_train2014_annotations.json": {
        "annotations": [
            {"question_id": n, "answers": [{"raw_answer": word, "answer": word[:3]} for word in ("rare", "usual", "usual")]}
            for n in (1, 2, 3, 4)
        ]
    },
    "ocr_vqa/dataset.json": {**{f"B{n}": BOOK for n in range(5)}, "T": {**BOOK, "split": 3}},
    "aokvqa/aokvqa_v1p0_train.json": [{"image_id": 9, "question": "What?", "choices": ["w", "x", "y", "z"], "correct_choice_idx": 2}],
    "textvqa/TextCaps_0.1_train.json": {"data": [{"image_id": "ab", "caption_str": text} for text in ("A sign.", "A stop sign.")]},
    "textvqa/TextVQA_Rosetta_OCR_v0.2_train.json": {"data": [{"image_id": "ab", "ocr_tokens": ["STOP", "ALL"]}]},
    "vg/region_descriptions.json": [
        {
            "id": 3,
            "regions": [{"phrase": f"a tree {n}.", "x": 0, "y": 0, "width": 50, "height": 25} for n in range(15)]
            + [{"phrase": ".", "x": 0, "y": 0, "width": 1, "height": 1}],
        },
        {"id": 4, "regions": []},
    ],
    "vg/image_data.json": [{"image_id": 3, "width": 100, "height": 100, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/3.jpg"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    for name in ("refcoco", "refcoco+", "refcocog"):
        (tmp_path / name).mkdir()
        (tmp_path / PARTS[name][0]).write_bytes(pickle.dumps(REFERENCES, 2))
        (tmp_path / PARTS[name][1]).write_text(json.dumps(INSTANCES))
    return tmp_path


def count(turns: list[dict[str, str]]) -> int:
    row_of({"conversations": turns})
    return sum(len(turn["value"]) for turn in turns)


def rows(folder: Path, *parts: str) -> list[Any]:
    return list(mixed_rows(folder, count, parts=parts, most_tokens=7))


def said(row: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def test_all_parts_give_rows_that_can_train(folder: Path) -> None:
    found = [row for row in rows(folder) if not isinstance(row, LeftOut)]
    assert {row["id"].split("-")[0] for row in found} == set(PARTS)
    for row in found:
        assert row_of(row)[0].answers
    assert len({row["id"] for row in found}) == len(found)


def test_questions_about_one_picture_are_one_conversation(folder: Path) -> None:
    first, second = [row for row in rows(folder, "vqav2") if not isinstance(row, LeftOut)]
    assert first["image"] == "coco/train2017/000000000009.jpg"
    assert said(first) == [f"<image>\nq1?\n{SHORT}", "a1", "q2?", "a2"]
    assert said(second) == [f"<image>\nq3?\n{SHORT}", "a3"]
    assert LeftOut("of vqav2 without an answer") in rows(folder, "vqav2")
    assert said(rows(folder, "okvqa")[0])[1::2] == ["usual", "usual"]
    assert said(rows(folder, "gqa")[0])[::2] == [f"<image>\nq0?\n{SHORT}", "q1?", "q2?"]
    assert rows(folder, "gqa")[0]["image"] == "gqa/images/77.jpg"


def test_books_are_drawn_from_those_for_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions_module, "_NUM_BOOKS", 3)
    found = rows(folder, "ocrvqa")
    assert found.count(LeftOut("of ocrvqa above 80,000")) == 2
    assert len(found) == 5
    assert said(found[-1]) == [f"<image>\nWho wrote it?\n{SHORT}", "Eve", "Is it a guide?", "No"]
    assert "T" not in {row["id"].removeprefix("ocrvqa-") for row in found[2:]}


def test_choices_are_turned_so_that_every_letter_is_right_once(folder: Path) -> None:
    found = rows(folder, "aokvqa")
    assert [said(row)[1] for row in found] == ["C", "B", "A", "D"]
    assert said(found[1])[0] == f"<image>\nWhat?\nA. x\nB. y\nC. z\nD. w\n{LETTER}"


def test_captions_come_with_the_words_in_the_picture(folder: Path) -> None:
    (row,) = rows(folder, "textcaps")
    request = "<image>\nProvide a one-sentence caption for the provided image."
    assert said(row)[0] == f"{request}\nReference OCR token: STOP, ALL"
    assert said(row)[1] in ("A sign.", "A stop sign.")
    (folder / "textvqa/TextVQA_Rosetta_OCR_v0.2_train.json").unlink()
    assert said(rows(folder, "textcaps")[0])[0] == request


def test_regions_come_in_short_conversations_either_way(folder: Path) -> None:
    found = rows(folder, "refcoco")
    assert found[0] == LeftOut("of refcoco without a box")
    assert [len(said(row)) // 2 for row in found[1:]] == [9, 3]
    box = "[0.1, 0.3, 0.6, 0.55]"  # of a picture of 200x100, padded to 200x200
    asked = "".join(said(found[1]) + said(found[2]))
    assert f"Please provide a short description for this region: {box}." in asked
    assert "Please provide the bounding box coordinate of the region this sentence describes: dog 1" in asked
    for question, answer in zip(said(found[1])[::2], said(found[1])[1::2], strict=True):
        assert (answer == box) == ("bounding box" in question)
        assert answer == box or answer.startswith("dog ")
    assert "held out" not in asked


def test_at_most_ten_regions_of_a_picture_are_drawn(folder: Path) -> None:
    found, left_out = rows(folder, "vg")
    assert left_out == LeftOut("of vg without a size or a region")
    assert found["image"] == "vg/VG_100K_2/3.jpg"
    assert len(said(found)) == 20
    assert "[0.0, 0.0, 0.5, 0.25]" in "".join(said(found))
    assert "tree 1.." not in "".join(said(found))


def test_boxes_are_shares_of_the_padded_square() -> None:
    assert _square((0, 0, 100, 200), (100, 200)) == (0.25, 0.0, 0.75, 1.0)
    assert _square((-5, 0, 500, 20), (100, 50)) == (0.0, 0.25, 1.0, 0.45)


def test_shared_talks_end_with_the_last_exchange_that_fits(folder: Path) -> None:
    found = rows(folder, "sharegpt")
    assert said(found[0]) == ["a", "b"]
    assert said(found[1]) == ["a", "b"] * 3
    assert found[2:] == [
        LeftOut("of sharegpt that are no exchanges"), LeftOut("of sharegpt above 7 tokens"), LeftOut("of sharegpt that are no exchanges"),
        LeftOut("of sharegpt that no template can hold"),
    ]  # fmt: skip
    assert rows(folder, "instruct")[1]["image"] == "coco/train2017/000000033471.jpg"


def test_parts_that_are_not_there_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "gqa/train_balanced_questions.json").unlink()
    with caplog.at_level(logging.INFO):
        assert not any(row["id"].startswith("gqa") for row in rows(folder) if not isinstance(row, LeftOut))
    assert "gqa is left out: there is no gqa/train_balanced_questions.json" in caplog.text
    assert "aokvqa: 4 rows" in caplog.text
    with pytest.raises(DataError, match=r"lacks gqa/train_balanced_questions\.json"):
        rows(folder, "gqa")
    with pytest.raises(DataError, match="no part 'x'"):
        rows(folder, "x")
    with pytest.raises(DataError, match="has no part of the mixture"):
        rows(folder / "gqa")
