"""From ids that arrive one by one to text that can be shown at once.

Owns: Detokenizer (never half a character, never a lost space) and StopMatcher (never a piece of a stop string).
Invariant: a detokenizer's pieces joined equal tokenizer.decode_text of all ids; a matcher's equal the text up to the first stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.processing.tokenizer.text_bytes import ByteText
from llavakit.processing.tokenizer.vocabulary import Tokenizer

__all__ = ["Detokenizer", "StopMatcher"]


class Detokenizer:
    """Decode a growing answer, one id at a time; special tokens are not text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ByteText(replaces_each_byte=tokenizer.replaces_each_byte)
        self._is_first = True  # the first piece with text loses the dummy space

    def push(self, index: int) -> str:
        """Take one id and return the text that became certain."""
        data = self._tokenizer.text_bytes(index, is_first=self._is_first)
        if data is None:
            return ""
        self._is_first = False
        return self._text.push(data)

    def flush(self) -> str:
        """Return what was held back: replacement characters for an unfinished character."""
        return self._text.flush()


class StopMatcher:
    """Find the first stop string in text that arrives in pieces; hold back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Take a piece and return what may be shown; after a stop string nothing more is."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return self._take(min(found), rest="")
        num_open = max((self._open_length(stop) for stop in self._stops), default=0)
        cut = len(self._held) - num_open
        return self._take(cut, rest=self._held[cut:])

    def flush(self) -> str:
        """Return what was held back, when no more text comes."""
        return self._take(len(self._held), rest="")

    def _take(self, cut: int, *, rest: str) -> str:
        shown, self._held = self._held[:cut], rest
        return shown

    def _open_length(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((length for length in range(longest, 0, -1) if self._held.endswith(stop[:length])), 0)
