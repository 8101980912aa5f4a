"""The words that all layers share: messages, conversations, sampling parameters, results.

Owns: Conversation and SamplingParams, the only types by which a question enters and a generation loop is steered.
Refuses: torch, PIL, URLs and paths (media is bytes here; edges turn paths into bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llavakit.errors import PromptError

__all__ = [
    "Completion",
    "Conversation",
    "FinishReason",
    "ImagePart",
    "Message",
    "Part",
    "Role",
    "SamplingParams",
    "TextPart",
    "Usage",
]

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text as a person wrote it; nothing in it is markup."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One encoded picture (JPEG, PNG, WebP, GIF or BMP bytes)."""

    data: bytes


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: text and pictures in the order in which they were given."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn's text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """The turn's pictures."""
        return tuple(part for part in self.parts if isinstance(part, ImagePart))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: an optional system message, then user and assistant in turn, user first.

    Raises: PromptError when the order is another, a message is empty, or a picture is not in a user turn.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        turns = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        if not turns:
            raise PromptError("a conversation needs at least one user message, got none")
        for index, message in enumerate(turns):
            expected = "user" if index % 2 == 0 else "assistant"
            if message.role != expected:
                raise PromptError(
                    f"turn {index} must be from the {expected}, got {message.role!r}; user and assistant alternate, user first"
                )
        for message in self.messages:
            if not message.parts:
                raise PromptError(f"a {message.role} message needs a text or a picture, got none")
            if message.role != "user" and message.images:
                raise PromptError(f"pictures belong to user messages, got one in a {message.role} message")

    @classmethod
    def ask(cls, question: str, *images: bytes, system: str | None = None) -> Conversation:
        """Build the usual conversation: pictures first, then one question."""
        parts: tuple[Part, ...] = (*(ImagePart(data) for data in images), TextPart(question))
        head = () if system is None else (Message("system", (TextPart(system),)),)
        return cls((*head, Message("user", parts)))

    def reply(self, answer: str, *parts: Part) -> Conversation:
        """Append the assistant's answer and, when parts are given, the user's next turn."""
        turns: Iterable[Message] = (Message("assistant", (TextPart(answer),)),)
        follow = (Message("user", parts),) if parts else ()
        return Conversation((*self.messages, *turns, *follow))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """All pictures, in order."""
        return tuple(image for message in self.messages for image in message.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop; the only type that the generation loop reads.

    Raises: PromptError naming the field, its value and its range.
    """

    max_tokens: int | None = None
    """New tokens at most; None fills the model's context."""
    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p."""
    seed: int | None = None
    """Seed of this request's own generator; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer besides the model's own end token."""
    ignore_eos: bool = False
    """Continue past the end token (benchmarks)."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise PromptError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise PromptError(f"temperature must be a number from 0 to 100, got {self.temperature}")
        if not (math.isfinite(self.top_p) and 0 < self.top_p <= 1):
            raise PromptError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise PromptError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise PromptError(f"seed must fit in 64 bits, got {self.seed}")
        if any(not text for text in self.stop):
            raise PromptError("a stop string must not be empty")
        if any(token < 0 for token in self.stop_token_ids):
            raise PromptError(f"stop_token_ids must not be negative, got {self.stop_token_ids}")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, image tokens included in the prompt's."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer: ids hold the end token where it was produced, text never does."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
