"""The words that all layers share: messages, conversations, sampling parameters, results.

Owns: Conversation and SamplingParams, the only types by which a question enters and a generation loop is steered.
Refuses: torch, PIL, URLs and paths (media is bytes here; edges turn paths into bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    "Scored",
    "TextPart",
    "TokenLogprob",
    "Usage",
]

_MOST_LOGPROBS = 100
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
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens that occurred, prompt included, and multiply the negative ones; 1 is off."""
    no_repeat_ngram_size: int = 0
    """Never repeat so many tokens in a row, prompt included; 0 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds already; negative values favour them."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as the answer holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    min_tokens: int = 0
    """Tokens before the answer may end by itself."""
    n: int = 1
    """Answers to give: as many draws, or the best of a beam search."""
    num_beams: int = 1
    """Width of a beam search; 1 is none."""
    length_penalty: float = 1.0
    """Beam search divides an answer's log probability by its length to this power; above 0 favours long answers."""
    early_stopping: bool | Literal["never"] = False
    """Beam search ends when there are num_beams answers (True), when better ones are unlikely (False), or impossible ("never")."""
    seed: int | None = None
    """Seed of this request's own generator; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer besides the model's own end token."""
    ignore_eos: bool = False
    """Continue past the end token (benchmarks)."""
    logprobs: int | None = None
    """Return each token's log probability under the model, before penalties and temperature, with so many of the likeliest ones."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, except the first."""
    json_schema: str | None = None
    """JSON text of a schema that the answer follows; "{}" is any JSON value."""
    regex: str | None = None
    """Regular expression that the whole answer matches."""
    choices: tuple[str, ...] = ()
    """Texts of which the answer is one."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise PromptError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise PromptError(f"temperature must be a number from 0 to 100, got {self.temperature}")
        if not (math.isfinite(self.top_p) and 0 < self.top_p <= 1):
            raise PromptError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not (math.isfinite(self.min_p) and 0 <= self.min_p <= 1):
            raise PromptError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise PromptError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.no_repeat_ngram_size < 0 or self.min_tokens < 0:
            raise PromptError(
                f"no_repeat_ngram_size and min_tokens must be 0 or more, got {self.no_repeat_ngram_size} and {self.min_tokens}"
            )
        self._check_scores()
        self._check_answers()
        if self.top_k < 0:
            raise PromptError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise PromptError(f"seed must fit in 64 bits, got {self.seed}")
        if any(not text for text in self.stop):
            raise PromptError("a stop string must not be empty")
        if any(token < 0 for token in self.stop_token_ids):
            raise PromptError(f"stop_token_ids must not be negative, got {self.stop_token_ids}")

    def _check_scores(self) -> None:
        """Check what changes, reports or limits scores."""
        for name, value in (("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)):
            if not (math.isfinite(value) and -100 <= value <= 100):
                raise PromptError(f"{name} must be a number from -100 to 100, got {value}")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0 or not math.isfinite(bias):
                raise PromptError(f"logit_bias maps token ids to numbers, got {token!r}: {bias!r}")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= _MOST_LOGPROBS:
                raise PromptError(f"{name} must be from 0 to {_MOST_LOGPROBS}, got {count}")
        if (self.json_schema is not None) + (self.regex is not None) + bool(self.choices) > 1:
            raise PromptError("an answer follows a json_schema, a regex or choices; give one of them")
        if any(not choice for choice in self.choices):
            raise PromptError("a choice must not be empty")

    @property
    def is_constrained(self) -> bool:
        """Whether the answer's form is prescribed."""
        return self.json_schema is not None or self.regex is not None or bool(self.choices)

    def _check_answers(self) -> None:
        """Check how many answers are asked for, and how they are searched."""
        if self.n < 1 or self.num_beams < 1:
            raise PromptError(f"n and num_beams must be at least 1, got {self.n} and {self.num_beams}")
        if self.num_beams > 1 and self.n > self.num_beams:
            raise PromptError(f"a search of {self.num_beams} beams gives at most as many answers, got n={self.n}")
        if self.num_beams > 1 and (self.is_constrained or self.logprobs is not None or self.prompt_logprobs is not None):
            raise PromptError("a beam search neither follows a form nor reports log probabilities; set num_beams to 1")
        if self.num_beams > 1 and self.temperature > 0:
            raise PromptError("a beam search draws nothing; set temperature to 0")
        if self.num_beams == 1 and self.n > 1 and self.temperature == 0:
            raise PromptError("several answers need a temperature above 0 or num_beams above 1, or they would all be the same")
        if not math.isfinite(self.length_penalty):
            raise PromptError(f"length_penalty must be a number, got {self.length_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise PromptError(f'early_stopping must be True, False or "never", got {self.early_stopping!r}')


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, image tokens included in the prompt's."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log probability, and the likeliest tokens at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer: ids hold the end token where it was produced, text never does."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    others: tuple[Completion, ...] = ()
    """The further answers, where more than one was asked for; the best of a beam search comes first."""
    score: float | None = None
    """Of a beam search: log probability over length to the length_penalty."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per id, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """One per prompt id but the first, where they were asked for."""
    error: str | None = None
    """Why there is no whole answer, with finish_reason "error"."""


@dataclass(frozen=True, slots=True)
class Scored:
    """How likely a given answer is."""

    text: str
    logprob: float
    """Of the whole answer, its end included: the sum over its tokens."""
    share: float
    """Its probability among the candidates: theirs add up to 1."""
    tokens: tuple[TokenLogprob, ...]

    @property
    def mean_logprob(self) -> float:
        """The log probability per token, which does not favour short answers."""
        return self.logprob / len(self.tokens)

    @classmethod
    def of(cls, candidates: Sequence[str], logprobs: Sequence[Sequence[TokenLogprob]]) -> list[Scored]:
        """Score candidates, in their order, by the log probabilities of their tokens."""
        sums = [math.fsum(token.logprob for token in tokens) for tokens in logprobs]
        weights = [math.exp(total - max(sums)) for total in sums]
        scored = zip(candidates, sums, weights, logprobs, strict=True)
        return [cls(text, total, weight / math.fsum(weights), tuple(tokens)) for text, total, weight, tokens in scored]
