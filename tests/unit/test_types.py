"""Conversations and sampling parameters: what is accepted, and what the refusals say."""

import math

import pytest

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
