"""Answers of a prescribed form always have it, whatever the model would have said; forms that cannot be followed are refused."""

import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from llavakit.engine.constraint import Grammars
from llavakit.engine.llm import LLM
from llavakit.errors import ConfigError, PromptError
from llavakit.types import Conversation, SamplingParams
from tests.tiny import save_llava

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_red": {"type": "boolean"},
    },
    "required": ["name", "count", "is_red"],
    "additionalProperties": False,
}
REGEXES = (r"[a-c]{3,5}", r"(yes|no), \d{2}", r"https?://[a-z]{1,9}/\d", r"ä[ö-ü]{2}\n!")
CHOICES = ("red", "a blue square", "rot / grün", '"quoted"\n')


@functools.cache
def tiny_llm() -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        return LLM(save_llava(Path(folder) / "model"), dtype="float32", device="cpu")


def answered(**form: Any) -> list[str]:
    """Ask with different seeds, and greedily."""
    draws = [
        SamplingParams(max_tokens=200, temperature=temperature, seed=seed, **form) for seed, temperature in enumerate((0, 0.7, 2, 5, 20))
    ]
    completions = tiny_llm().chat([Conversation.ask("a red circle or two?")] * len(draws), draws)
    assert [completion.finish_reason for completion in completions] == ["stop"] * len(draws), completions
    return [completion.text for completion in completions]


def test_answers_follow_a_schema() -> None:
    for text in answered(json_schema=json.dumps(SCHEMA)):
        value = json.loads(text)
        assert value.keys() == {"name", "count", "is_red"}
        assert isinstance(value["name"], str)
        assert 0 <= value["count"] <= 99
        assert isinstance(value["is_red"], bool)


@pytest.mark.parametrize("regex", REGEXES)
def test_answers_match_a_regex(regex: str) -> None:
    for text in answered(regex=regex):
        assert re.fullmatch(regex, text), text


def test_answers_are_one_of_the_choices() -> None:
    found = answered(choices=CHOICES)
    assert set(found) <= set(CHOICES)
    assert answered(choices=("only this",)) == ["only this"] * 5


def test_an_answer_that_is_cut_begins_in_its_form() -> None:
    completion = tiny_llm().chat(Conversation.ask("?"), SamplingParams(max_tokens=2, choices=("a blue square",)))
    assert completion.finish_reason == "length"
    assert "a blue square".startswith(completion.text)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": "[]"}, "must be a JSON object"),
        ({"json_schema": '{"type": "nothing"}'}, "cannot be followed"),
        ({"json_schema": '{"$ref": "https://example.com/other.json"}'}, "cannot be followed"),
        ({"regex": "(unclosed"}, "cannot be followed"),
        ({"regex": "x" * 70_000}, "at most 65536"),
        ({"json_schema": "[" * 100_000}, "json_schema is not JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_forms_that_cannot_be_followed_are_refused(form: dict[str, str], told: str) -> None:
    with pytest.raises(PromptError, match=told):
        tiny_llm().chat(Conversation.ask("?"), SamplingParams(**form))  # type: ignore[arg-type]


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'llavakit\[constrain\]'"):
        Grammars(tiny_llm().processor.tokenizer, [2]).constrain(SamplingParams(regex="a"))
