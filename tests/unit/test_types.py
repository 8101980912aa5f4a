"""Conversations and sampling parameters: what is accepted, and what the refusals say."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest

import llavakit
from llavakit.errors import PromptError
from llavakit.types import Conversation, ImagePart, Message, SamplingParams, TextPart


def user(text: str) -> Message:
    return Message("user", (TextPart(text),))


def assistant(text: str) -> Message:
    return Message("assistant", (TextPart(text),))


def test_ask_puts_pictures_before_the_question_and_the_system_text_first() -> None:
    conversation = Conversation.ask("what?", b"1", b"2", system="be brief")
    assert [message.role for message in conversation.messages] == ["system", "user"]
    assert conversation.messages[1].parts == (ImagePart(b"1"), ImagePart(b"2"), TextPart("what?"))
    assert conversation.images == (ImagePart(b"1"), ImagePart(b"2"))
    assert conversation.messages[1].text == "what?"


def test_reply_appends_the_answer_and_the_next_turn() -> None:
    conversation = Conversation.ask("what?").reply("that", TextPart("why?"))
    assert [message.text for message in conversation.messages] == ["what?", "that", "why?"]
    assert len(Conversation.ask("what?").reply("that").messages) == 2


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ((), "at least one user message"),
        ((Message("system", (TextPart("s"),)),), "at least one user message"),
        ((assistant("a"),), "turn 0 must be from the user"),
        ((user("a"), user("b")), "turn 1 must be from the assistant"),
        ((user("a"), Message("system", (TextPart("s"),))), "turn 1 must be from the assistant"),
        ((Message("user", ()),), "needs a text or a picture"),
        ((user("a"), Message("assistant", (ImagePart(b"1"),))), "pictures belong to user messages"),
    ],
)
def test_conversations_out_of_order_are_refused(messages: tuple[Message, ...], told: str) -> None:
    with pytest.raises(PromptError, match=told):
        Conversation(messages)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "64 bits"),
        ({"stop": ("a", "")}, "must not be empty"),
        ({"stop_token_ids": (-1,)}, "must not be negative"),
    ],
)
def test_sampling_parameters_name_what_is_wrong(values: dict[str, object], told: str) -> None:
    with pytest.raises(PromptError, match=told):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_every_sampling_parameter_is_read_by_the_loop() -> None:
    """An argument that nobody reads would be ignored in silence."""
    package = Path(llavakit.__file__).parent
    files = [*(package / "engine").glob("*.py"), package / "ops" / "sampling.py"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if ast.unparse(node.value).endswith("params")}
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= read


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size and min_tokens"),
        ({"min_tokens": -1}, "no_repeat_ngram_size and min_tokens"),
        ({"n": 0}, "n and num_beams must be at least 1"),
        ({"num_beams": 2, "n": 3}, "at most as many answers"),
        ({"num_beams": 2, "temperature": 1.0}, "a beam search draws nothing"),
        ({"n": 2}, "they would all be the same"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty must be a number"),
        ({"early_stopping": "always"}, "early_stopping must be True, False"),
    ],
)
def test_what_cannot_be_searched_or_drawn_is_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(PromptError, match=told):
        SamplingParams(**values)  # type: ignore[arg-type]
