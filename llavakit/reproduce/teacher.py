"""The rule-based teacher: writes training conversations from captions and labelled boxes, never from pixels.

Owns: the three kinds of text that the miniature learns from. Plays the part of the language-only model of the paper.
Turns of one picture are drawn from the same truth; kinds that small models find hard are drawn more often.
"""

from __future__ import annotations

import random

from llavakit.types import Conversation, ImagePart, Message, Part, TextPart
from llavakit.world.questions import KINDS, Question, ask
from llavakit.world.truth import Truth, captions, listing

__all__ = ["caption_pair", "draw_questions", "instruction", "small_talk", "text_instruction"]

_WEIGHTS = {
    "describe": 1.5,
    "count": 1.0,
    "count_of": 1.5,
    "exist": 1.3,
    "color": 1.4,
    "what": 1.0,
    "where": 1.2,
    "side": 3.0,
    "compare": 1.0,
    "read": 1.2,
    "reason": 1.2,
}
_SMALL_TALK = (
    (("Hello!", "Hi.", "Hello", "Good morning!"), "Hello! Show me a picture and ask me about it."),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am a very small LLaVA. I answer questions about pictures of shapes, digits, letters and words.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help"),
        "I can count things, name their colors, read digits, letters and words, and say where things are.",
    ),
    (("Thank you!", "Thanks.", "Thank you very much."), "You are welcome!"),
    (("Goodbye!", "Bye."), "Goodbye!"),
)
_NO_PICTURE = "I cannot see a picture. Please show me one."


def caption_pair(truth: Truth, rng: random.Random, image: bytes) -> Conversation:
    """Pair a picture with one of its captions, mostly the full one (stage 1, template plain)."""
    full, labels, some = captions(truth, rng)
    caption = rng.choices((full, labels, some), (0.7, 0.2, 0.1))[0]
    return Conversation((Message("user", (ImagePart(image),)), Message("assistant", (TextPart(caption),))))


def draw_questions(truth: Truth, rng: random.Random, count: int) -> list[Question]:
    """Draw questions of different kinds about one picture; fewer where the picture allows fewer."""
    kinds = sorted(KINDS, key=lambda kind: rng.random() ** (1.0 / _WEIGHTS[kind]), reverse=True)
    written = (ask(truth, kind, rng) for kind in kinds)
    return [question for question in written if question is not None][:count]


def instruction(truth: Truth, rng: random.Random, image: bytes, turns: int) -> Conversation:
    """Write a conversation about a picture (stage 2, template v1)."""
    return _conversation((ImagePart(image),), _pairs(truth, rng, turns))


def text_instruction(truth: Truth, rng: random.Random, turns: int) -> Conversation:
    """Write the same kind of conversation over a described picture: the language model's own schooling."""
    described = TextPart(f"The picture shows {listing(truth.boxes)}.\n")
    return _conversation((described,), _pairs(truth, rng, turns))


def small_talk(rng: random.Random, truth: Truth) -> Conversation:
    """Write a short exchange without a picture: greetings, and questions that need a picture."""
    if rng.random() < 0.5:
        return _conversation((), [(question.text, _NO_PICTURE) for question in draw_questions(truth, rng, 1)])
    asked, answer = rng.choice(_SMALL_TALK)
    return _conversation((), [(rng.choice(asked), answer)])


def _pairs(truth: Truth, rng: random.Random, turns: int) -> list[tuple[str, str]]:
    """Draw questions with their answers; some questions are written carelessly, as people do."""
    return [(_careless(question.text, rng), question.answer) for question in draw_questions(truth, rng, turns)]


def _careless(text: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.1:
        text = text.rstrip("?.")
    if 0.05 < roll < 0.15:
        text = text[0].lower() + text[1:]
    return text


def _conversation(head: tuple[Part, ...], pairs: list[tuple[str, str]]) -> Conversation:
    messages = []
    for index, (asked, answer) in enumerate(pairs):
        messages.append(Message("user", (*(head if index == 0 else ()), TextPart(asked))))
        messages.append(Message("assistant", (TextPart(answer),)))
    return Conversation(tuple(messages))
