"""From ids that arrive one by one to text that can be shown at once.

Owns: Detokenizer (never half a character, never a lost space) and StopMatcher (never a piece of a stop string).
Invariant: a detokenizer's pieces joined equal tokenizer.decode_text of all ids; a matcher's equal the text up to the first stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.processing.tokenizer.slow import LlamaTokenizer

__all__ = ["Detokenizer", "StopMatcher"]

_REPLACEMENT = "\ufffd"
_SPACE = "▁"


class Detokenizer:
    """Decode a growing answer, one id at a time; special tokens are not text."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = tokenizer.special_ids
        self._bytes = b""  # the beginning of a character, from byte pieces
        self._is_first = True  # the first piece with text loses the dummy space

    def push(self, index: int) -> str:
        """Take one id and return the text that became certain."""
        if index in self._specials or not 0 <= index < self._tokenizer.vocab_size:
            return ""
        byte = self._tokenizer.byte_value(index)
        if byte is not None:
            self._is_first = False
            self._bytes += bytes((byte,))
            return self._take_characters()
        return self.flush() + self._piece_text(self._tokenizer.convert_ids_to_tokens(index))

    def flush(self) -> str:
        """Return what was held back: each byte of an unfinished character is a replacement character."""
        held, self._bytes = self._bytes, b""
        return _REPLACEMENT * len(held)

    def _piece_text(self, piece: str) -> str:
        if self._is_first:
            self._is_first = False
            piece = piece.removeprefix(_SPACE)
        return piece.replace(_SPACE, " ")

    def _take_characters(self) -> str:
        """Decode the held bytes as sentencepiece does, one replacement character per bad byte; keep an unfinished character."""
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode()
                self._bytes = b""
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode()
                self._bytes = self._bytes[error.start :]
                if error.end == error.start + len(self._bytes) and error.reason == "unexpected end of data":
                    return text
                text += _REPLACEMENT
                self._bytes = self._bytes[1:]
        return text


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
