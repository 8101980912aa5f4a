"""Preference rows in each form that they come in, and what is no pair."""

import json
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import DataError
from llavakit.training.pairs import PairSource
from llavakit.training.pictures import open_pictures
from llavakit.training.preference import pack_pairs
from llavakit.training.preference_config import CorruptionConfig
from llavakit.training.rows import open_rows
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.odd_rows import ODD, Held, with_one_place_replaced
from tests.tiny import NUM_IMAGE_TOKENS, tiny_processor

QUESTION, GOOD, BAD = "what is there?", "a red circle", "two blue squares"
TURN = {"from": "human", "value": QUESTION}
FORMS: dict[str, dict[str, Any]] = {
    "llava": {"conversations": [{**TURN, "value": f"<image>\n{QUESTION}"}], "chosen": GOOD, "rejected": BAD},
    "unmarked": {"conversations": [TURN], "chosen": GOOD, "rejected": BAD},
    "trl texts": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "trl messages": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        "chosen": [{"role": "assistant", "content": GOOD}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}],
    },
    "trl implicit": {
        "chosen": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": GOOD}],
        "rejected": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": BAD}],
    },
    "llava turns": {"conversations": [TURN], "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
    "rlhf-v": {"question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "rlhf-v nested": {"text": json.dumps({"question": QUESTION, "chosen": GOOD, "rejected": BAD})},
}


def source(folder: Path, rows: list[Any], corruption: CorruptionConfig | None = None) -> PairSource:
    (folder / "a.png").write_bytes(to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 30, 20)))
    (folder / "rows.json").write_text(json.dumps(rows))
    return PairSource(
        open_rows(folder / "rows.json"), open_pictures(folder), tiny_processor(), corruption=corruption, max_sample_tokens=200
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(tmp_path: Path, form: str) -> None:
    found = source(tmp_path, [{**FORMS[form], "image": "a.png"}, {**FORMS["llava"], "image": ["a.png"]}])
    assert found.sample(0).chosen == found.sample(1).chosen
    assert found.sample(0).rejected == found.sample(1).rejected
    assert found.sample(0).grids == found.sample(1).grids


def test_measures_are_those_of_the_sample(tmp_path: Path) -> None:
    for corruption in (None, CorruptionConfig()):
        found = source(tmp_path, [{**FORMS["rlhf-v"], "image": "a.png"}, FORMS["rlhf-v"]], corruption)
        for index in range(2):
            sample, measured = found.sample(index), found.measure(index)
            assert measured.num_tokens == sample.num_tokens == pack_pairs([sample]).ids_T.numel()
            assert measured.num_supervised == sum(sample.chosen.loss_mask) + sum(sample.rejected.loss_mask)
        assert found.measure(0).num_tokens > found.measure(1).num_tokens + NUM_IMAGE_TOKENS - 1
    assert found.talk(0).messages[-1].text == GOOD


def test_pairs_that_cannot_train_are_measured_as_such(tmp_path: Path) -> None:
    same, lost = {**FORMS["rlhf-v"], "rejected": GOOD}, {**FORMS["rlhf-v"], "image": "gone.png"}
    found = source(tmp_path, [same, {**FORMS["rlhf-v"], "chosen": " "}, lost, {**FORMS["rlhf-v"], "question": "a" * 300}])
    messages = [found.measure(index).problems[0].message for index in range(4)]
    assert "are the same" in messages[0]
    assert "the chosen answer is empty" in messages[1]
    assert "gone.png" in messages[2]
    assert "at most 200 fit" in messages[3]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "7"}, "needs chosen and rejected"),
        ({"text": "[" * 100_000}, "is no JSON"),
        (7, "needs chosen and rejected"),
        ({"chosen": GOOD}, "needs chosen and rejected"),
        ({"chosen": GOOD, "rejected": BAD}, "needs conversations, prompt or question"),
        ({"text": "{"}, "is no JSON"),
        ({"question": QUESTION, "chosen": 3, "rejected": BAD}, "an answer must be a text"),
        ({"question": "<image> <image>", "image": "a.png", "chosen": GOOD, "rejected": BAD}, "2 <image> marks but 1 pictures"),
        ({"conversations": [{"from": "gpt", "value": "hi"}], "chosen": GOOD, "rejected": BAD}, "must end with a question"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": GOOD, "rejected": BAD}, "messages need a role"),
        ({"question": QUESTION, "image": [3], "chosen": GOOD, "rejected": BAD}, "must be file names"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path: Path, row: Any, complaint: str) -> None:
    found = source(tmp_path, [row])
    assert complaint in found.measure(0).problems[0].message
    with pytest.raises(DataError, match=complaint):
        found.sample(0)


def test_turns_inside_of_answers_must_be_the_prompts(tmp_path: Path) -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]

    good = [
        {"prompt": "Q1", "chosen": said("Q1", "a"), "rejected": said("Q1", "b")},
        {"prompt": said("Q1", "A1", "Q2"), "chosen": said("Q1", "A1", "Q2", "a"), "rejected": said("Q1", "A1", "Q2", "b")},
        {"prompt": None, "question": "Q1", "chosen": "a", "rejected": "b"},
        {"system": "Be short.", "question": "Q1", "chosen": "a", "rejected": "b"},
    ]
    found = source(tmp_path, good)
    assert [found.measure(index).problems for index in range(4)] == [()] * 4
    assert found.talk(3).messages[0].text == "Be short."
    bad = [
        {"prompt": "Q1", "chosen": said("Q1", "a1", "Q2", "a"), "rejected": said("Q1", "b1", "Q3", "b")},
        {"prompt": "Q1", "chosen": said("Q2", "a"), "rejected": said("Q2", "b")},
        {"prompt": "Q1", "chosen": said("Q1", "a1", "Q2", "a"), "rejected": said("Q1", "a1", "Q2", "b")},
        {"prompt": "Q1", "system": 3, "chosen": "a", "rejected": "b"},
    ]
    lost = source(tmp_path, bad)
    assert [[fault.kind for fault in lost.measure(index).problems] for index in range(4)] == [["pair"], ["pair"], ["pair"], ["turn"]]


def test_odd_texts_of_pairs_are_told(tmp_path: Path) -> None:
    found = source(tmp_path, [{"id": "x", "question": "what is </s>?", "chosen": GOOD, "rejected": BAD}]).measure(0)
    assert ([fault.kind for fault in found.problems], found.id, found.is_usable) == (["markup in text"], "x", True)


def test_a_picture_without_a_mark_comes_in_the_first_question(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be short."}, TURN]
    found = source(tmp_path, [{"image": "a.png", "conversations": turns, "chosen": GOOD, "rejected": BAD}])
    assert found.measure(0).problems == ()
    assert len(found.talk(0).messages[1].images) == 1


def test_any_value_at_any_place_is_measured(tmp_path: Path) -> None:
    rows = [other for form in FORMS.values() for odd in ODD for other in with_one_place_replaced({**form, "image": ["a.png"]}, odd)]
    found = PairSource(Held(*rows), open_pictures(tmp_path), tiny_processor())
    for index, row in enumerate(rows):
        measured = found.measure(index)
        assert measured.num_tokens > 0 or not measured.is_usable, row
