"""The pieces of a sentencepiece model file, read from its bytes and written into new ones.

The file is a protobuf message, small enough to be walked over here without a protobuf library.
Source: sentencepiece_model.proto (ModelProto: pieces = 1, trainer_spec = 2, normalizer_spec = 3; SentencePiece: piece = 1, score = 2,
type = 3; TrainerSpec: model_type = 3, byte_fallback = 35, unk_id = 40, unk_piece = 45 and on; NormalizerSpec: name = 1,
add_dummy_prefix = 3, remove_extra_whitespaces = 4). GGUF numbers the types of pieces in the same way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Piece", "PieceType", "SentencePieces", "unused_pieces"]

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _FIRST_ROLE_ID, _FIRST_ROLE_PIECE = 3, 35, 40, 45
_NAME, _DUMMY_PREFIX, _EXTRA_SPACES = 1, 3, 4
_BPE = 2
_VARINT, _BYTES, _FIXED32 = 0, 2, 5


class PieceType(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieces:
    """What a BPE model of Llama's kind consists of."""

    pieces: tuple[Piece, ...]
    has_dummy_space: bool = True
    """Whether a space is put before a text."""
    is_llama: bool = True
    """Whether it merges by score and leaves a text as it is, as Llama's do; others cannot be described by their pieces alone."""

    @classmethod
    def of_model(cls, proto: bytes) -> SentencePieces:
        """Read a model file that sentencepiece has loaded."""
        pieces, kind, spaces, charsmap = [], 1, {_DUMMY_PREFIX: 1, _EXTRA_SPACES: 1}, b""
        for number, start, end in _fields(proto, 0, len(proto)):
            inner = {field: (first, last) for field, first, last in _fields(proto, start, end)}
            if number == _PIECES:
                pieces.append(_read_piece(proto, inner))
            elif number == _TRAINER and _MODEL_TYPE in inner:
                kind = _varint(proto, inner[_MODEL_TYPE][0])[0]
            elif number == _NORMALIZER:
                spaces |= {field: _varint(proto, inner[field][0])[0] for field in spaces if field in inner}
                charsmap = proto[slice(*inner[2])] if 2 in inner else charsmap
        is_llama = kind == _BPE and not spaces[_EXTRA_SPACES] and not charsmap
        return cls(tuple(pieces), bool(spaces[_DUMMY_PREFIX]), is_llama)

    def to_model(self, roles: Sequence[int]) -> bytes:
        """Write a model file; roles are the ids of unk, bos and eos."""
        pieces = b"".join(_field(_PIECES, _written_piece(piece)) for piece in self.pieces)
        has_bytes = any(piece.type == PieceType.BYTE for piece in self.pieces)
        trainer = _field(_MODEL_TYPE, _BPE) + _field(_BYTE_FALLBACK, int(has_bytes))
        for place, index in enumerate(roles):
            trainer += _field(_FIRST_ROLE_ID + place, index) + _field(_FIRST_ROLE_PIECE + place, self.pieces[index].text.encode())
        normalizer = _field(_NAME, b"identity") + _field(_DUMMY_PREFIX, int(self.has_dummy_space)) + _field(_EXTRA_SPACES, 0)
        return pieces + _field(_TRAINER, trainer) + _field(_NORMALIZER, normalizer)


def unused_pieces(proto: bytes, ids: frozenset[int]) -> bytes:
    """Return a model file with the user-defined ones of these pieces marked as unused."""
    changed = bytearray(proto)
    index = -1
    for number, start, end in _fields(proto, 0, len(proto)):
        if number == _PIECES:
            index += 1
            if index in ids:
                for inner, place, _ in _fields(proto, start, end):
                    if inner == _TYPE and proto[place] == PieceType.USER_DEFINED:
                        changed[place] = PieceType.UNUSED
    return bytes(changed)


def _read_piece(proto: bytes, fields: Mapping[int, tuple[int, int]]) -> Piece:
    text = proto[slice(*fields[_TEXT])].decode("utf-8")
    score = struct.unpack_from("<f", proto, fields[_SCORE][0])[0] if _SCORE in fields else 0.0
    return Piece(text, score, proto[fields[_TYPE][0]] if _TYPE in fields else PieceType.NORMAL)


def _written_piece(piece: Piece) -> bytes:
    score = _tag(_SCORE, _FIXED32) + struct.pack("<f", piece.score)
    return _field(_TEXT, piece.text.encode()) + score + _field(_TYPE, piece.type)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _tag(number, _VARINT) + _written_varint(value)
    return _tag(number, _BYTES) + _written_varint(len(value)) + value


def _tag(number: int, wire: int) -> bytes:
    return _written_varint(number << 3 | wire)


def _written_varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _fields(proto: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Walk over a message's fields: number, and where the value lies."""
    while start < end:
        tag, start = _varint(proto, start)
        match tag & 7:
            case 0:
                following = _varint(proto, start)[1]
            case 1:
                following = start + 8
            case 2:
                length, start = _varint(proto, start)
                following = start + length
            case _:
                following = start + 4
        yield tag >> 3, start, following
        start = following


def _varint(proto: bytes, start: int) -> tuple[int, int]:
    value, shift = 0, 0
    while proto[start] & 0x80:
        value |= (proto[start] & 0x7F) << shift
        start, shift = start + 1, shift + 7
    return value | proto[start] << shift, start + 1
