"""The examination: what is asked, that nothing is asked twice, and how marks become scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from llavakit.engine.llm import LLM
from llavakit.reproduce.examination import Condition, Mark, examine, prior_scores, scores
from llavakit.types import Completion, Conversation, SamplingParams, Usage

SCENES: dict[Condition, int] = {"plain": 80, "held_out": 6, "jpeg": 3, "wide": 3, "shuffled": 4}


class Parrot:
    """Answers every question with its own text, and fails after so many."""

    def __init__(self, patience: int = 10**6) -> None:
        self.asked: list[Conversation] = []
        self.patience = patience

    def chat(self, conversations: Sequence[Conversation], params: SamplingParams) -> list[Completion]:
        del params
        if len(self.asked) >= self.patience:
            raise KeyboardInterrupt
        self.asked += conversations
        return [Completion(conversation.messages[0].text, (), "stop", Usage(1, 1)) for conversation in conversations]


def sit(folder: Path, parrot: Parrot) -> list[Mark]:
    return examine(cast(LLM, parrot), SCENES, folder / "replies.sqlite")


def test_an_interrupted_examination_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = Parrot()
    expected = sit(tmp_path, whole)
    assert len(expected) == len(whole.asked) == 2 * sum(SCENES.values())
    (tmp_path / "cut").mkdir()
    first, second = Parrot(patience=100), Parrot()
    with pytest.raises(KeyboardInterrupt):
        sit(tmp_path / "cut", first)
    assert 0 < len(first.asked) < len(whole.asked)
    assert sit(tmp_path / "cut", second) == expected
    assert first.asked + second.asked == whole.asked


def test_every_reply_is_the_one_to_its_question(tmp_path: Path) -> None:
    marks = sit(tmp_path, Parrot())
    assert all(mark.reply == mark.question for mark in marks)
    assert {mark.condition for mark in marks} == set(SCENES)
    assert len({mark.kind for mark in marks}) >= 8


def mark(condition: Condition, kind: str, key: str, *, is_right: bool) -> Mark:
    return Mark(condition, kind, "?", key, "", is_right)


def test_scores_count_by_condition_and_kind() -> None:
    marks = [
        mark("plain", "count", "1", is_right=True),
        mark("plain", "count", "2", is_right=False),
        mark("plain", "color", "red", is_right=True),
        mark("jpeg", "color", "red", is_right=True),
    ]
    table = scores(marks)
    assert {name: (score.right, score.total) for name, score in table["plain"].items()} == {"all": (2, 3), "count": (1, 2), "color": (1, 1)}
    assert table["plain"]["all"].interval.low < 2 / 3 < table["plain"]["all"].interval.high
    assert set(table["jpeg"]) == {"all", "color"}


def test_the_prior_is_the_most_common_answer_of_each_kind() -> None:
    keys = (("count", "1"), ("count", "1"), ("count", "2"), ("exist", "yes"), ("exist", "no"))
    prior = prior_scores([mark("shuffled", kind, key, is_right=False) for kind, key in keys])
    assert (prior["count"].right, prior["exist"].right, prior["all"].right, prior["all"].total) == (2, 1, 3, 5)
