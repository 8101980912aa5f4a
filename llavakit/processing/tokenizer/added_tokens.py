"""Tokens that are cut out of a text before the model of the vocabulary sees it.

Owns: their table by text and id, cutting a text at them, their entries in checkpoint files.
Source: transformers 4.37's order at one place: the longest token wins, then lstrip, rstrip and single_word are heeded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken

from llavakit.errors import CheckpointError, InputError

__all__ = ["AddedTokens", "Numbered", "entry_of_token", "in_order", "special_token", "token_of_entry"]

Numbered = Mapping[str, int] | Mapping[int, AddedToken]
"""Added tokens as a caller gives them: special ones by their ids, or tokens with flags by id."""
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


class AddedTokens:
    """A table of added tokens; each text and each id occurs once."""

    def __init__(self) -> None:
        self._tokens: dict[int, AddedToken] = {}
        self._ids: dict[str, int] = {}
        self._pattern: re.Pattern[str] | None = None

    def __contains__(self, index: int) -> bool:
        return index in self._tokens

    def put(self, token: AddedToken, index: int) -> None:
        """Enter a token; the same text with the same id takes the new flags. Raises: CheckpointError when either is taken."""
        text = token.content
        if not text or self._ids.get(text, index) != index or (index in self._tokens and self._tokens[index].content != text):
            raise CheckpointError(f"token {text!r} cannot have id {index}; each token has one id, and that one is taken")
        self._tokens[index], self._ids[text] = token, index
        self._pattern = None

    def find(self, text: str) -> int | None:
        """Look up a token's id."""
        return self._ids.get(text)

    def token(self, index: int) -> AddedToken | None:
        """Look up the token of an id."""
        return self._tokens.get(index)

    def ids(self) -> dict[str, int]:
        """Return all ids by text, in the order of ids."""
        return {self._tokens[index].content: index for index in sorted(self._tokens)}

    def tokens(self) -> dict[int, AddedToken]:
        """Return all tokens by id, in the order of ids."""
        return {index: self._tokens[index] for index in sorted(self._tokens)}

    def special_ids(self) -> frozenset[int]:
        """Return the ids of tokens that are no text."""
        return frozenset(index for index, token in self._tokens.items() if token.special)

    def cut(self, text: str) -> Iterator[str | int]:
        """Cut a text at its added tokens: stretches of text, and ids where a token stood."""
        if not self._tokens:
            yield text
            return
        if self._pattern is None:
            longest_first = sorted(self._ids, key=len, reverse=True)
            self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        parts = [part for part in self._pattern.split(text) if part]
        for place, part in enumerate(parts):
            if part in self._ids:
                self._heed_flags(parts, place)
        for part in parts:
            if part:
                yield self._ids.get(part, part)

    def _heed_flags(self, parts: list[str], place: int) -> None:
        """Strip the neighbours of a token, or make it part of one; both are judged as they stand before stripping."""
        token = self._tokens[self._ids[parts[place]]]
        left = parts[place - 1] if place > 0 else ""
        right = parts[place + 1] if place + 1 < len(parts) else ""
        if token.rstrip and right:
            parts[place + 1] = right.lstrip()
        if token.lstrip and left:
            parts[place - 1] = left.rstrip()
        if token.single_word and left and left[-1] != " ":
            parts[place - 1] += token.content
            parts[place] = ""
        elif token.single_word and right and right[0] != " ":
            parts[place + 1] = token.content + parts[place + 1]
            parts[place] = ""


def in_order(numbered: Numbered) -> list[tuple[int, AddedToken]]:
    """List given tokens in the order of their ids. Raises: InputError."""
    pairs = []
    for key, value in numbered.items():
        if isinstance(key, str) and isinstance(value, int):
            pairs.append((value, special_token(key)))
        elif isinstance(key, int) and isinstance(value, AddedToken):
            pairs.append((key, value))
        else:
            raise InputError(f"added tokens are given as text: id, or as id: AddedToken; got {key!r}: {value!r}")
    return sorted(pairs, key=lambda pair: pair[0])


def special_token(text: str) -> AddedToken:
    """Build a special token that is matched exactly as it is written."""
    return AddedToken(text, normalized=False, special=True)


def token_of_entry(entry: Any, *, is_special: bool = True) -> AddedToken | None:
    """Read a token that a file writes as a string or as a table with "content"; None where there is none.

    is_special holds where the entry does not say.
    """
    if isinstance(entry, AddedToken):
        return entry
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    if not isinstance(text, str) or not text:
        return None
    flags = {"normalized": False, "special": is_special}
    if isinstance(entry, Mapping):
        flags |= {name: entry[name] for name in _FLAGS if isinstance(entry.get(name), bool)}
    return AddedToken(text, **flags)


def entry_of_token(token: AddedToken) -> dict[str, Any]:
    """Write a token as tokenizer_config.json does."""
    return {"content": token.content, **{name: getattr(token, name) for name in _FLAGS}}
