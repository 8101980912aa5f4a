"""From ids that arrive one by one to text that can be shown at once.

Owns: Detokenizer (never half a character, never a lost space) and StopMatcher (never a piece of a stop string).
Invariant: the pieces joined equal the text of all ids decoded together, cut at the first stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.processing.tokenizer.slow import LlamaTokenizer

__all__ = ["Detokenizer", "StopMatcher"]

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Decode a growing answer; special tokens are not text."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = tokenizer.special_ids
        self._ids: list[int] = []
        self._start = 0  # decoding from here gives the right spaces
        self._shown = 0  # ids up to here are shown

    def push(self, index: int) -> str:
        """Take one id and return the text that became certain."""
        if index in self._specials or index >= self._tokenizer.vocab_size:
            return ""
        self._ids.append(index)
        text = self._new_text()
        is_open = text.endswith(_REPLACEMENT) and len(self._ids) - self._shown < _MAX_CHARACTER_BYTES
        return "" if is_open else self._show(text)

    def flush(self) -> str:
        """Return what was held back: at the end an unfinished character is replacement characters."""
        return self._show(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.sp_model.decode(self._ids[self._start : self._shown])
        return str(self._tokenizer.sp_model.decode(self._ids[self._start :]))[len(before) :]

    def _show(self, text: str) -> str:
        self._start, self._shown = self._shown, len(self._ids)
        return text


class StopMatcher:
    """Find the first stop string in text that arrives in pieces; hold back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Take a piece and return what may be shown; after a stop string nothing more is."""
        if self.is_stopped or not self._stops:
            return "" if self.is_stopped else text
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(self._open_length(stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """Return what was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _open_length(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        return next((length for length in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:length])), 0)
