"""Answers of a prescribed form: JSON of a schema, a regular expression, one of some choices.

Owns: Constraint (which tokens may follow) and Grammars, which makes them for one tokenizer through llguidance, an optional extra.
Invariant: an answer that ends by itself has the form, as text: where the tokenizer drops the space of an answer's first piece, a first
piece with a space is allowed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from llavakit.errors import ConfigError, FormError, PromptError
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.types import SamplingParams

__all__ = ["Constraint", "Grammars"]

_MOST_CHARACTERS = 1 << 16


class Constraint(Protocol):
    """What keeps one answer in its form."""

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""

    def allowed(self, num_ids: int) -> Tensor:
        """Return a mask [num_ids] of the tokens that may come next."""

    def take(self, token: int) -> None:
        """Know the next token."""


class Grammars:
    """Makes constraints for answers in one tokenizer's ids; the tokenizer is prepared when the first one is asked for."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self.tokenizer, self.end_ids = tokenizer, tuple(sorted(end_ids))

    def constrain(self, params: SamplingParams) -> Constraint:
        """Return a fresh constraint. Raises: PromptError for a form that cannot be followed, ConfigError without llguidance."""
        library = _library()
        grammar = _grammar(params, allows_space=self._words.drops_space)
        matcher = library.LLMatcher(self._prepared, grammar, log_level=0)
        if matcher.is_error():
            raise FormError(f"the answer's form cannot be followed: {matcher.get_error()[:500]}")
        return _Matched(matcher, self.end_ids)

    @functools.cached_property
    def _words(self) -> _Words:
        return _Words.of(self.tokenizer, self.end_ids)

    @functools.cached_property
    def _prepared(self) -> Any:
        library = _library()
        return library.LLTokenizer(
            library.TokenizerWrapper(self._words), eos_token=list(self.end_ids), slices=library.LLTokenizer.json_slices()
        )


class _Matched:
    """A constraint that llguidance keeps."""

    def __init__(self, matcher: Any, end_ids: Sequence[int]) -> None:
        self._matcher, self._end_ids = matcher, end_ids

    @property
    def is_over(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self, num_ids: int) -> Tensor:
        bytes_V = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        mask = torch.zeros(num_ids, dtype=torch.bool)
        shared = min(num_ids, bytes_V.numel())
        mask[:shared] = bytes_V[:shared] > 0
        return mask

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FormError(f"the answer's form cannot be followed any further: {self._matcher.get_error()[:500]}")


@dataclass(frozen=True, slots=True)
class _Words:
    """A tokenizer as llguidance wants it: the bytes of every id."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None
    encode: Callable[[str], Sequence[int]]
    drops_space: bool
    """Whether an answer's first piece loses its space."""
    by_bytes: Mapping[bytes, int]
    longest: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, end_ids: Sequence[int]) -> _Words:
        found = [tokenizer.text_bytes(index) for index in range(len(tokenizer))]
        # An id without text gets a name that no text can spell.
        tokens = [b"\xff<%d>" % index if data is None else data for index, data in enumerate(found)]
        special = [index for index, data in enumerate(found) if data is None]
        drops_space = any(data is not None and data != tokenizer.text_bytes(index, is_first=True) for index, data in enumerate(found))
        by_bytes = {data: index for index, data in reversed(list(enumerate(found))) if data}
        longest = max(map(len, by_bytes))
        return cls(tokens, special, end_ids[0], tokenizer.bos_token_id, tokenizer.encode_text, drops_space, by_bytes, longest)

    def __call__(self, text: str | bytes) -> list[int]:
        """Cut text that stands inside an answer: a tokenizer may put a space before what it takes for a beginning."""
        data = text.encode() if isinstance(text, str) else text
        try:
            inside = data.decode()
        except UnicodeDecodeError:
            return self._longest(data)
        for before in ("", "\n"):
            ids = list(self.encode(before + inside))
            size = 0
            for place in range(len(ids), -1, -1):
                if size >= len(data):
                    if b"".join(self.tokens[index] for index in ids[place:]) == data:
                        return ids[place:]
                    break
                size += len(self.tokens[ids[place - 1]])
        return self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        """Cut bytes by the longest token each time; a byte without a token ends it."""
        ids: list[int] = []
        place = 0
        while place < len(data):
            size = next(
                (size for size in range(min(self.longest, len(data) - place), 0, -1) if data[place : place + size] in self.by_bytes), 0
            )
            if not size:
                break
            ids.append(self.by_bytes[data[place : place + size]])
            place += size
        return ids


def _grammar(params: SamplingParams, *, allows_space: bool) -> str:
    """Write the form as a Lark grammar."""
    if params.json_schema is not None:
        form = f"%json {_schema(params.json_schema)}"
    elif params.regex is not None:
        form = f"/{_delimited(params.regex)}/"
    else:
        form = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choices)
    if len(form) > _MOST_CHARACTERS:
        raise FormError(f"the answer's form has {len(form)} characters, at most {_MOST_CHARACTERS} are allowed")
    return f'start: {"SPACE? " if allows_space else ""}form\nSPACE: " "\nform: {form}\n'


def _schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"json_schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise PromptError(f"json_schema must be a JSON object, got {text[:80]}")
    return json.dumps({**schema, "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}})


def _delimited(regex: str) -> str:
    """Escape what would end a Lark pattern: slashes that are not escaped yet, and line breaks."""
    escaped, is_escaped = [], False
    for character in regex:
        if character == "/" and not is_escaped:
            escaped.append("\\")
        if character == "\n":
            character = "n" if is_escaped else "\\n"
        is_escaped = character == "\\" and not is_escaped
        escaped.append(character)
    return "".join(escaped)


def _library() -> ModuleType:
    """Import llguidance. Raises: ConfigError when it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError("answers of a prescribed form need llguidance: pip install 'llavakit[constrain]'") from error
    return llguidance
