"""What requests are: OpenAI's, field by field.

Owns: the models of all request bodies, and how a body becomes one. The only pydantic of the package.
Invariants: a field that is not here is an error that names it; types are taken as they are (true is no number, "1" neither); fields that
have no effect are those that ask for nothing (user, metadata, ...).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from llavakit.server.faults import HttpError

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "ImageContent",
    "JsonSchemaFormat",
    "ScoreRequest",
    "TextContent",
    "TokenizeRequest",
    "read_request",
]

_INT64 = 1 << 63


_T = TypeVar("_T")


class _FirstAlone(FailFast):
    """Complain about the first wrong entry alone: complaints about 100,000 would take seconds."""

    __hash__ = object.__hash__  # unions want it


Items = Annotated[list[_T], _FirstAlone()]
"""A list of a request."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextContent(_Strict):
    """A text, in which nothing is markup."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: a data URL, upload:NAME for a file sent along, or an address where the server fetches those."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class ChatMessage(_Strict):
    """One turn. What answers hold besides their text is taken back as long as it says nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[Content]
    name: str | None = Field(None, max_length=128)
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Strict):
    """A JSON schema and its name."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class _Sampled(_Strict):
    """What all requests for answers share."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=1 << 16)
    stop: str | Items[str] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)


class ChatRequest(_Sampled):
    """Of /v1/chat/completions."""

    messages: Items[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1 << 16)
    response_format: Format | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    # What is not here; programs that pass all of OpenAI's arguments on send null.
    audio: None = None
    function_call: None = None
    functions: None = None
    modalities: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    reasoning_effort: None = None
    tool_choice: None = None
    tools: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(_Sampled):
    """Of /v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: int | None = Field(None, ge=0, le=1 << 16)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class TokenizeRequest(_Strict):
    """Of /v1/tokenize: a conversation or a text."""

    model: str = Field(min_length=1, max_length=512)
    messages: Items[ChatMessage] | None = Field(None, min_length=1)
    prompt: str | None = None
    add_generation_prompt: bool = True


class ScoreRequest(_Strict):
    """Of /v1/score: a conversation, and answers whose probabilities are wanted."""

    model: str = Field(min_length=1, max_length=512)
    messages: Items[ChatMessage] = Field(min_length=1)
    candidates: Items[str] = Field(min_length=1)


_M = TypeVar("_M", bound=BaseModel)
_TOLD = {
    "missing": "is required",
    "extra_forbidden": "is not supported",
    "none_required": "is not supported",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "union_tag_invalid": "must be of type {expected_tags}",
    "union_tag_not_found": "needs a type",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}
_MOST_PARAM_CHARS = 200
_TAGS = ("text", "image_url", "json_object", "json_schema")
_UNSUPPORTED = ("extra_forbidden", "none_required")


def read_request(kind: type[_M], values: Any) -> _M:
    """Check a body and return what it asks for. Raises: HttpError (400) naming the first field that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # Of a union every member complains; the one that goes deepest is about what was meant.
        found = error.errors(include_url=False, include_input=False)
        first = next((one for one in found if one["type"] in _UNSUPPORTED), max(found, key=lambda one: len(one["loc"])))
        param = _place(first["loc"])
        text = _TOLD.get(first["type"], "is not valid").format(**first.get("ctx", {}))
        code = "unsupported_parameter" if first["type"] in _UNSUPPORTED else "invalid_value"
        raise HttpError(400, code, f"{param or 'the body'} {text}", param=param or None) from None


def _place(parts: tuple[int | str, ...]) -> str:
    """Write a place in a body without the members of unions that pydantic names in between."""
    kept: list[int | str] = []
    for before, part in zip(("", *parts), parts, strict=False):
        is_kind = isinstance(part, str) and (part == "str" or part.startswith("list["))
        is_tag = part in _TAGS and (isinstance(before, int) or before == "response_format")
        if not is_kind and not is_tag:
            kept.append(part)
    return ".".join(map(str, kept))[:_MOST_PARAM_CHARS]
