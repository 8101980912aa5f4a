"""From the bytes of pieces to text, as they come.

Owns: which bytes are a character and what stands for bytes that are none; the byte alphabet of byte-level BPE.
Invariant: the pieces of text joined do not depend on where the bytes were cut.
"""

from __future__ import annotations

import functools

__all__ = ["ByteText", "bytes_of_byte_level"]

_REPLACEMENT = "\ufffd"


class ByteText:
    """Decode UTF-8 that arrives in pieces; an unfinished character is held back."""

    def __init__(self, *, replaces_each_byte: bool) -> None:
        """Choose what U+FFFD stands for: each bad byte (sentencepiece), or each longest run that began a character (Rust, Python)."""
        self._replaces_each_byte = replaces_each_byte
        self._held = b""

    def push(self, data: bytes) -> str:
        """Take bytes and return the text that became certain."""
        self._held += data
        text = ""
        while self._held:
            try:
                text += self._held.decode()
                self._held = b""
            except UnicodeDecodeError as error:
                text += self._held[: error.start].decode()
                self._held = self._held[error.start :]
                num_bad = error.end - error.start
                if num_bad == len(self._held) and error.reason == "unexpected end of data":
                    break
                text += _REPLACEMENT
                self._held = self._held[1 if self._replaces_each_byte else num_bad :]
        return text

    def flush(self) -> str:
        """Return what stands for an unfinished character."""
        held, self._held = self._held, b""
        return _REPLACEMENT * (len(held) if self._replaces_each_byte else min(len(held), 1))


def bytes_of_byte_level(piece: str) -> bytes:
    """Return the bytes that a piece of byte-level BPE stands for; a piece with other characters stands for itself."""
    alphabet = _alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


@functools.cache
def _alphabet() -> dict[str, int]:
    """Build GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
