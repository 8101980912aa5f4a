"""A sentencepiece model: its pieces, its ids for plain text, its bytes.

Owns: loading with limits and clear errors, the variant without the dummy space, hiding of pieces that user text must not reach.
The model file is a protobuf message: one behind the first overrides its fields.
Source: sentencepiece_model.proto (ModelProto: normalizer_spec = 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from llavakit.errors import CheckpointError, ConfigError, InputError
from llavakit.processing.tokenizer.sentence_pieces import unused_pieces

__all__ = ["MODEL_NAME", "SentenceModel", "read_model", "save_model"]

MODEL_NAME = "tokenizer.model"
_MAX_MODEL_BYTES = 64 << 20
_SPACE = "▁"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\n")
"""A line of its files: a byte string in base64, and its rank."""
_NO_DUMMY_SPACE = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }


class SentenceModel:
    """The pieces of a tokenizer.model and how text becomes them."""

    def __init__(self, proto: bytes, options: Mapping[str, Any]) -> None:
        """Load a model; options are sentencepiece's own, such as enable_sampling. Raises: CheckpointError, ConfigError."""
        self.proto, self._options = proto, dict(options)
        self.processor = _load(proto, self._options)
        self.size = int(self.processor.vocab_size())
        _check_pieces(self.processor, self.size)
        self._plain = self.processor
        self._hidden: frozenset[int] = frozenset()
        self._has_dummy_space = str(self.processor.encode("a", out_type=str)[0]).startswith(_SPACE)

    def own_roles(self) -> dict[str, str]:
        """Return the model's own bos, eos and unk."""
        model = self.processor
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        return {role: str(model.id_to_piece(index)) for role, index in ids.items()}

    def without_dummy_space(self) -> sentencepiece.SentencePieceProcessor:
        """Load the model once more, without the space that it puts before a text."""
        return _load(self.proto + _NO_DUMMY_SPACE, self._options)

    def find(self, token: str) -> int | None:
        """Look up a piece's id."""
        index = int(self.processor.piece_to_id(token))
        return index if index != self.processor.unk_id() or token == self.processor.id_to_piece(index) else None

    def piece(self, index: int) -> str | None:
        """Look up the piece of an id; None outside the model."""
        return str(self.processor.id_to_piece(index)) if 0 <= index < self.size else None

    def hide(self, ids: frozenset[int]) -> None:
        """Keep plain text from becoming these pieces: user-defined ones are found in any text otherwise."""
        hidden = frozenset(index for index in ids if _can_be_text(self.processor, index))
        if hidden != self._hidden:
            self._hidden, self._plain = hidden, _load(unused_pieces(self.proto, hidden), self._options)

    def encode(self, text: str) -> list[int]:
        """Encode plain text."""
        return list(self._plain.encode(text))

    def text_bytes(self, index: int, *, is_first: bool) -> bytes | None:
        """Return the bytes that a piece stands for, at the beginning of a text without the dummy space; None for no text."""
        model = self.processor
        if not 0 <= index < self.size or model.is_control(index) or model.is_unknown(index):
            return None
        piece = str(model.id_to_piece(index))
        if model.is_byte(index):
            return bytes((int(piece[1:-1], 16),))
        if is_first and self._has_dummy_space:
            piece = piece.removeprefix(_SPACE)
        return piece.replace(_SPACE, " ").encode()


def read_model(path: Path) -> bytes:
    """Read a model file. Raises: CheckpointError when it is missing, unreadable or too large."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; copy the checkpoint's sentencepiece model there, or use LlamaTokenizerFast")
    try:
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_MODEL_BYTES} bytes; a tokenizer never is")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def save_model(proto: bytes, folder: Path, prefix: str | None) -> tuple[str]:
    """Write [prefix-]tokenizer.model into an existing folder and return its path. Raises: InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; make it first")
    path = folder / (f"{prefix}-{MODEL_NAME}" if prefix else MODEL_NAME)
    path.write_bytes(proto)
    return (str(path),)


def _load(proto: bytes, options: Mapping[str, Any]) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=proto, **options)
    except RuntimeError as error:
        raise CheckpointError(_other_kind(proto)) from error
    except TypeError as error:
        raise ConfigError(f"sp_model_kwargs {dict(options)!r} are not sentencepiece's: {error}") from error
    if not proto or min(model.bos_id(), model.eos_id(), model.unk_id()) < 0:
        raise CheckpointError("tokenizer.model lacks a bos, eos or unk piece; Llama's tokenizers have all three")
    return model


def _other_kind(proto: bytes) -> str:
    """Say what a file is that sentencepiece does not load, and what to do."""
    if _TIKTOKEN.match(proto):
        return "tokenizer.model is Llama 3's list for tiktoken, which is not read; the model's tokenizer.json has to lie beside it"
    return "tokenizer.model is not a sentencepiece model; download it again"


def _check_pieces(model: sentencepiece.SentencePieceProcessor, size: int) -> None:
    """Check that each piece is text, which sentencepiece does not. Raises: CheckpointError."""
    try:
        model.id_to_piece(list(range(size)))
    except UnicodeDecodeError as error:
        raise CheckpointError("tokenizer.model has a piece that is not UTF-8; download it again") from error


def _can_be_text(model: sentencepiece.SentencePieceProcessor, index: int) -> bool:
    is_other = (model.is_control(index), model.is_unknown(index), model.is_byte(index), model.is_unused(index))
    return not any(is_other)
