"""What is answered: OpenAI's objects, whole or in pieces.

Owns: Chat and Text, which write the answers of /v1/chat/completions and /v1/completions, and event, one server-sent event.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llavakit.engine.request import TokenEvent
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.types import Completion, TokenLogprob

__all__ = ["DONE", "Chat", "Form", "Text", "event"]

DONE = b"data: [DONE]\n\n"
Groups = Sequence[Sequence[Completion]]
"""The answers of each prompt."""
_FINISH = {"stop": "stop", "length": "length", "abort": "stop", "error": "stop"}


def event(value: Any) -> bytes:
    """Write one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Form(Protocol):
    """How the answers of a request are written."""

    def whole(self, groups: Groups) -> dict[str, Any]:
        """Write all answers."""
        ...

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Write what comes before the first token."""
        ...

    def piece(self, found: TokenEvent, *, first: int) -> list[dict[str, Any]]:
        """Write what one event adds; first is the number of the request's first choice."""
        ...

    def usage(self, groups: Groups) -> dict[str, Any]:
        """Write the last piece of a stream, which counts."""
        ...


@dataclass(frozen=True, slots=True)
class _Head:
    """What every object of a request has."""

    id: str
    model: str
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()))

    def base(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Chat:
    """Answers to conversations."""

    def __init__(self, id: str, model: str, tokenizer: Tokenizer, *, has_usage: bool) -> None:
        self._head, self._has_usage = _Head(f"chatcmpl-{id}", model, tokenizer), has_usage

    def whole(self, groups: Groups) -> dict[str, Any]:
        """Write all answers."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": _chat_logprobs(one.logprobs, self._head.tokenizer),
                "finish_reason": _FINISH[one.finish_reason],
            }
            for index, one in enumerate(itertools.chain(*groups))
        ]
        return {**self._head.base("chat.completion"), "choices": choices, "usage": _usage(groups)}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Say who speaks."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None) for index in range(num_choices)]

    def piece(self, found: TokenEvent, *, first: int) -> list[dict[str, Any]]:
        """Write a token's text, and the end of its answer."""
        index, chunks = first + found.answer, []
        if found.text or found.logprob is not None:
            known = None if found.logprob is None else (found.logprob,)
            chunks.append(self._chunk(index, {"content": found.text}, _chat_logprobs(known, self._head.tokenizer), None))
        if found.completion is not None:
            chunks.append(self._chunk(index, {}, None, _FINISH[found.completion.finish_reason]))
        return chunks

    def usage(self, groups: Groups) -> dict[str, Any]:
        """Count."""
        return {**self._head.base("chat.completion.chunk"), "choices": [], "usage": _usage(groups)}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        extra = {"usage": None} if self._has_usage else {}
        return {**self._head.base("chat.completion.chunk"), "choices": [choice], **extra}


class Text:
    """Continuations of texts."""

    def __init__(self, id: str, model: str, tokenizer: Tokenizer, *, has_usage: bool) -> None:
        self._head, self._has_usage = _Head(f"cmpl-{id}", model, tokenizer), has_usage

    def whole(self, groups: Groups) -> dict[str, Any]:
        """Write all answers."""
        choices = [
            {
                "index": index,
                "text": one.text,
                "logprobs": _text_logprobs(one.logprobs, self._head.tokenizer),
                "finish_reason": _FINISH[one.finish_reason],
            }
            for index, one in enumerate(itertools.chain(*groups))
        ]
        return {**self._head.base("text_completion"), "choices": choices, "usage": _usage(groups)}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Say nothing."""
        del num_choices
        return []

    def piece(self, found: TokenEvent, *, first: int) -> list[dict[str, Any]]:
        """Write a token's text, with the end where it is the last one."""
        known = None if found.logprob is None else (found.logprob,)
        finish = None if found.completion is None else _FINISH[found.completion.finish_reason]
        if not (found.text or known or finish):
            return []
        logprobs = _text_logprobs(known, self._head.tokenizer)
        choice = {"index": first + found.answer, "text": found.text, "logprobs": logprobs, "finish_reason": finish}
        extra = {"usage": None} if self._has_usage else {}
        return [{**self._head.base("text_completion"), "choices": [choice], **extra}]

    def usage(self, groups: Groups) -> dict[str, Any]:
        """Count."""
        return {**self._head.base("text_completion"), "choices": [], "usage": _usage(groups)}


def _usage(groups: Groups) -> dict[str, int]:
    prompts = sum(group[0].usage.prompt_tokens for group in groups)
    answers = sum(one.usage.completion_tokens for one in itertools.chain(*groups))
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


def _chat_logprobs(known: Sequence[TokenLogprob] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if known is None:
        return None
    content = [
        {
            **_token(one.token, one.logprob, tokenizer),
            "top_logprobs": [_token(index, logprob, tokenizer) for index, logprob in one.top],
        }
        for one in known
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(known: Sequence[TokenLogprob] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if known is None:
        return None
    tokens = [_spelled(one.token, tokenizer) for one in known]
    offsets = [sum(map(len, tokens[:place])) for place in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in known],
        "top_logprobs": [{_spelled(index, tokenizer): logprob for index, logprob in one.top} for one in known],
        "text_offset": offsets,
    }


def _token(index: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.text_bytes(index)
    return {"token": _spelled(index, tokenizer), "logprob": logprob, "bytes": None if data is None else list(data)}


def _spelled(index: int, tokenizer: Tokenizer) -> str:
    """Write a token as text: that of its bytes, or its name where it is no text."""
    data = tokenizer.text_bytes(index)
    return tokenizer.convert_ids_to_tokens(index) if data is None else data.decode("utf-8", errors="replace")
