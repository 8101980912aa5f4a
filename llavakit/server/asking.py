"""From what a request says to what the engine takes.

Owns: conversation_of, params_of, completion_params_of: one pure function per edge, every field consumed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llavakit.errors import PromptError
from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ImageContent,
    JsonSchemaFormat,
    TextFormat,
)
from llavakit.types import Conversation, ImagePart, Message, Part, Role, SamplingParams, TextPart

__all__ = ["completion_params_of", "conversation_of", "params_of"]

_TEMPERATURE = 1.0  # OpenAI's
_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def conversation_of(messages: Sequence[ChatMessage], pictures: Sequence[bytes], config: ServerConfig) -> Conversation:
    """Build the conversation around its pictures. Raises: HttpError (400)."""
    if len(messages) > config.max_messages:
        raise _wrong("messages", f"a conversation may have {config.max_messages} messages")
    images = iter(pictures)
    turns: list[Message] = []
    num_chars = 0
    for place, message in enumerate(messages):
        parts: list[Part] = []
        for part in [message.content] if isinstance(message.content, str) else message.content:
            if isinstance(part, ImageContent):
                parts.append(ImagePart(next(images)))
            else:
                parts.append(TextPart(part if isinstance(part, str) else part.text))
        turn = Message(_ROLES[message.role], tuple(parts))
        if message.role != "assistant" and not turn.images and not turn.text.strip():  # an answer may end before it says anything
            raise _wrong(f"messages.{place}.content", "a message must say something")
        num_chars += len(turn.text)
        turns.append(turn)
    _check_chars(num_chars, config)
    try:
        return Conversation(tuple(turns))
    except PromptError as error:
        raise _wrong("messages", str(error)) from error


def params_of(request: ChatRequest, config: ServerConfig, num_ids: int) -> SamplingParams:
    """Read how to choose tokens; num_ids is how many there are. Raises: HttpError (400)."""
    if None not in (request.max_tokens, request.max_completion_tokens) and request.max_tokens != request.max_completion_tokens:
        raise _wrong("max_tokens", "max_tokens and max_completion_tokens differ; give one")
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if request.top_logprobs is not None and not request.logprobs:
        raise _wrong("top_logprobs", "top_logprobs needs logprobs to be true")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(
        request, config, num_ids, max_tokens=asked, default=config.default_new_tokens, logprobs=logprobs, schema=_schema(request)
    )


def completion_params_of(request: CompletionRequest, config: ServerConfig, num_ids: int) -> SamplingParams:
    """The same of /v1/completions. Raises: HttpError (400)."""
    num_chars = sum(
        len(text) for text in ([request.prompt] if isinstance(request.prompt, str) else request.prompt) if isinstance(text, str)
    )
    _check_chars(num_chars, config)
    return _params(
        request, config, num_ids, max_tokens=request.max_tokens, default=_COMPLETION_TOKENS, logprobs=request.logprobs, schema=None
    )


def _params(
    request: ChatRequest | CompletionRequest,
    config: ServerConfig,
    num_ids: int,
    *,
    max_tokens: int | None,
    default: int,
    logprobs: int | None,
    schema: str | None,
) -> SamplingParams:
    most_tokens = config.max_new_tokens
    wanted = default if max_tokens is None else max_tokens
    if most_tokens is not None and wanted > most_tokens:
        if max_tokens is not None:
            raise _wrong("max_tokens", f"at most {most_tokens} tokens can be asked for")
        wanted = most_tokens
    values: dict[str, Any] = {
        "max_tokens": wanted,
        "temperature": _TEMPERATURE if request.temperature is None else request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "min_p": request.min_p,
        "n": _at_most("n", request.n, config.max_choices),
        "seed": request.seed,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": _biases(request.logit_bias, config, num_ids),
        "stop": _stops(request.stop, config),
        "logprobs": _at_most("top_logprobs", logprobs, config.max_logprobs),
        "json_schema": schema,
    }
    try:
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except PromptError as error:
        raise HttpError(400, "invalid_value", str(error)) from error


def _schema(request: ChatRequest) -> str | None:
    form = request.response_format
    if form is None or isinstance(form, TextFormat):
        return None
    return json.dumps(form.json_schema.schema_) if isinstance(form, JsonSchemaFormat) else '{"type": "object"}'


def _stops(stop: str | list[str] | None, config: ServerConfig) -> tuple[str, ...] | None:
    if stop is None:
        return None
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > config.max_stops or not all(1 <= len(text) <= config.max_stop_chars for text in stops):
        raise _wrong("stop", f"stop may have {config.max_stops} strings of 1 to {config.max_stop_chars} characters")
    return stops


def _biases(biases: dict[str, float] | None, config: ServerConfig, num_ids: int) -> dict[int, float] | None:
    if biases is None:
        return None
    if len(biases) > config.max_logit_bias:
        raise _wrong("logit_bias", f"logit_bias may have {config.max_logit_bias} tokens")
    if not all(name.isascii() and name.isdigit() and int(name) < num_ids and -100 <= bias <= 100 for name, bias in biases.items()):
        raise _wrong("logit_bias", f"logit_bias maps token ids from 0 to {num_ids - 1} to numbers from -100 to 100")
    return {int(name): bias for name, bias in biases.items()}


def _at_most(name: str, value: int | None, most: int) -> int | None:
    if value is not None and value > most:
        raise _wrong(name, f"{name} may be at most {most}")
    return value


def _check_chars(num_chars: int, config: ServerConfig) -> None:
    if num_chars > config.max_text_chars:
        raise _wrong("messages", f"the texts have {num_chars} characters, at most {config.max_text_chars} are allowed")


def _wrong(param: str, message: str) -> HttpError:
    return HttpError(400, "invalid_value", message, param=param)
