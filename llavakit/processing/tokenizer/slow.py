"""LlamaTokenizer on sentencepiece, with the behaviour of transformers 4.37's slow tokenizer (legacy).

Owns: ids, pieces, special and added tokens, rows of a batch. There are two ways in and two ways out:
encode() and decode() treat special tokens in text as transformers does; encode_text() and decode_text() know no special
token at all, and are what prompts and answers are made with.
Refuses: templates, pictures, tokenizers other than Llama's kind.
Legacy rule: text is cut at special tokens and each stretch goes to sentencepiece alone, so each gets its own dummy space.
Deviation: decode(skip_special_tokens=True) skips added tokens too, as the fast tokenizer does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import sentencepiece
import torch

from llavakit.errors import CheckpointError, InputError, PromptError
from llavakit.processing.tokenizer.fast_json import tokenizer_json
from llavakit.storage.documents import json_bytes, read_optional_json

__all__ = ["LlamaTokenizer"]

_MODEL_NAME = "tokenizer.model"
_MAX_MODEL_BYTES = 64 << 20
_UNLIMITED = int(1e30)  # transformers' way to say that no limit is known
_SPACE = "▁"


class LlamaTokenizer:
    """A Llama sentencepiece tokenizer: bos first, byte fallback, no pad token unless one is added."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | Path | bytes,
        *,
        added_tokens: Mapping[str, int] | None = None,
        pad_token: str | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        """Load tokenizer.model from a path or its bytes; added_tokens are special tokens beyond the model's pieces.

        Raises: CheckpointError when the model is not readable, or an added token's id is taken.
        """
        self._proto = vocab_file if isinstance(vocab_file, bytes) else _read_model(Path(vocab_file))
        self.sp_model = _load_model(self._proto)
        self.bos_token_id, self.eos_token_id, self.unk_token_id = self.sp_model.bos_id(), self.sp_model.eos_id(), self.sp_model.unk_id()
        self.bos_token, self.eos_token, self.unk_token = map(
            self.sp_model.id_to_piece, (self.bos_token_id, self.eos_token_id, self.unk_token_id)
        )
        self.add_bos_token, self.add_eos_token, self.padding_side = add_bos_token, add_eos_token, padding_side
        self.model_max_length = _UNLIMITED
        self.added_tokens: dict[str, int] = {}
        self._added_ids: dict[int, str] = {}
        self._pad_token: str | None = None
        for token, index in sorted((added_tokens or {}).items(), key=lambda item: item[1]):
            self._add(token, index)
        if pad_token is not None:
            self.add_special_tokens({"pad_token": pad_token})

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces of the model, added tokens not counted."""
        return int(self.sp_model.vocab_size())

    def __len__(self) -> int:
        """Return the pieces and added tokens together."""
        return max((self.vocab_size - 1, *self._added_ids)) + 1

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text: bos, eos, unk and all added tokens."""
        return frozenset((self.bos_token_id, self.eos_token_id, self.unk_token_id, *self._added_ids))

    @property
    def pad_token(self) -> str | None:
        """The token that fills rows; set it to a token that exists. Raises: InputError."""
        return self._pad_token

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        """Choose the token; it must exist."""
        if token is not None and self._find(token) is None:
            raise InputError(f'{token!r} is not in the vocabulary; add it with add_special_tokens({{"pad_token": {token!r}}})')
        self._pad_token = token

    @property
    def pad_token_id(self) -> int | None:
        """Id of the pad token, if there is one."""
        return None if self._pad_token is None else self.convert_tokens_to_ids(self._pad_token)

    def add_special_tokens(self, tokens: Mapping[Literal["pad_token", "image_token"], str]) -> int:
        """Add tokens by role, for example {"pad_token": "<pad>"}; returns how many are new."""
        if unknown := sorted(set(tokens) - {"pad_token", "image_token"}):
            raise InputError(f"cannot add a token as {unknown[0]!r}; the roles are pad_token and image_token")
        new = self.add_tokens(tuple(tokens.values()))
        if "pad_token" in tokens:
            self._pad_token = tokens["pad_token"]
        return new

    def add_tokens(self, tokens: Sequence[str]) -> int:
        """Append special tokens after the last id; returns how many are new."""
        new = [token for token in dict.fromkeys(tokens) if self._find(token) is None]
        for token in new:
            self._add(token, len(self))
        return len(new)

    def convert_tokens_to_ids(self, token: str) -> int:
        """Look up one piece or added token; an unknown one is unk."""
        index = self._find(token)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, index: int) -> str:
        """Look up the piece or added token of an id. Raises: InputError outside the vocabulary."""
        if index in self._added_ids:
            return self._added_ids[index]
        if not 0 <= index < self.vocab_size:
            raise InputError(f"id {index} is outside the vocabulary of {len(self)} tokens")
        return str(self.sp_model.id_to_piece(index))

    def _find(self, token: str) -> int | None:
        if token in self.added_tokens:
            return self.added_tokens[token]
        index = int(self.sp_model.piece_to_id(token))
        return index if index != self.unk_token_id or token == self.unk_token else None

    def _add(self, token: str, index: int) -> None:
        if not token or token in self.added_tokens or index < self.vocab_size or index in self._added_ids:
            raise CheckpointError(f"token {token!r} cannot be added with id {index}; each has one id, {self.vocab_size} or more")
        self.added_tokens[token] = index
        self._added_ids[index] = token

    # Text to ids

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text: no token is special, a typed </s> stays text; sentencepiece adds its dummy space in front.

        Raises: PromptError when the text holds half a surrogate pair, which no encoding can express.
        """
        try:
            return list(self.sp_model.encode(text.encode()))
        except UnicodeEncodeError as error:
            raise PromptError(f"the text is not valid Unicode at character {error.start}; send whole characters") from error

    def tokenize(self, text: str) -> list[str]:
        """Return the pieces of a text, without bos and eos; special tokens mean themselves."""
        return [self.convert_ids_to_tokens(index) for index in self._encode_marked(text)]

    def encode(self, text: str, text_pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """Encode text in which special tokens mean themselves."""
        first = self._encode_marked(text)
        second = None if text_pair is None else self._encode_marked(text_pair)
        return self.build_inputs_with_special_tokens(first, second) if add_special_tokens else first + (second or [])

    def build_inputs_with_special_tokens(self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None) -> list[int]:
        """Put bos before and eos after each sequence, where the flags ask for them."""
        head = [self.bos_token_id] if self.add_bos_token else []
        tail = [self.eos_token_id] if self.add_eos_token else []
        first = [*head, *token_ids_0, *tail]
        return first if token_ids_1 is None else [*first, *head, *token_ids_1, *tail]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool = False,
        max_length: int | None = None,
        return_tensors: Literal["pt"] | None = None,
    ) -> dict[str, Any]:
        """Encode one text or a batch into input_ids and attention_mask; max_length cuts texts from the right, never bos or eos.

        Raises: InputError when rows of different lengths should become a tensor without padding, or there is no pad token.
        """
        texts = [text] if isinstance(text, str) else list(text)
        num_special = len(self.build_inputs_with_special_tokens([]))
        room = None if max_length is None else max(max_length - num_special, 0)
        rows = [self.build_inputs_with_special_tokens(self._encode_marked(item)[:room]) for item in texts]
        masks = [[1] * len(row) for row in rows]
        if padding and len({len(row) for row in rows}) > 1:
            rows, masks = self.pad_rows(rows), self.pad_rows(masks, value=0)
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise InputError("texts of different lengths make a tensor only with padding=True")
            return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
        if isinstance(text, str):
            return {"input_ids": rows[0], "attention_mask": masks[0]}
        return {"input_ids": rows, "attention_mask": masks}

    def pad_rows(self, rows: Sequence[Sequence[int]], *, value: int | None = None) -> list[list[int]]:
        """Fill rows up to the longest on the padding side, with the pad token unless a value is given. Raises: InputError."""
        filler = self.pad_token_id if value is None else value
        if filler is None:
            raise InputError('padding needs a pad token; add one with add_special_tokens({"pad_token": "<pad>"})')
        width = max(map(len, rows), default=0)
        fills = [[filler] * (width - len(row)) for row in rows]
        is_left = self.padding_side == "left"
        return [[*fill, *row] if is_left else [*row, *fill] for row, fill in zip(rows, fills, strict=True)]

    def _encode_marked(self, text: str) -> list[int]:
        specials = sorted((self.bos_token, self.eos_token, self.unk_token, *self.added_tokens), key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, specials))})", text):
            if part in specials:
                ids.append(self.convert_tokens_to_ids(part))
            elif part:
                ids += self.encode_text(part)
        return ids

    # Ids to text

    def decode_text(self, ids: Iterable[int]) -> str:
        """Turn an answer's ids into text as sentencepiece does; special tokens and ids beyond the pieces are no text."""
        specials = self.special_ids
        return str(self.sp_model.decode([index for index in ids if index not in specials and 0 <= index < self.vocab_size]))

    def byte_value(self, index: int) -> int | None:
        """Return the byte that a byte piece such as <0x0A> stands for; None for every other id."""
        return int(self.sp_model.id_to_piece(index)[1:-1], 16) if self.sp_model.is_byte(index) else None

    def decode(self, ids: Iterable[int] | int, *, skip_special_tokens: bool = False) -> str:
        """Turn ids into text as the slow legacy tokenizer does, its spaces around special and added tokens included.

        Raises: InputError for an id outside the vocabulary.
        """
        roles = {self.bos_token, self.eos_token, self.unk_token, self._pad_token}
        specials = self.special_ids
        parts: list[str] = []
        tokens: list[str] = []
        for index in [ids] if isinstance(ids, int) else ids:
            token = self.convert_ids_to_tokens(index)
            if skip_special_tokens and index in specials:
                continue
            if index in self._added_ids and token not in roles:
                parts += (self.convert_tokens_to_string(tokens), token)
                tokens = []
            else:
                tokens.append(token)
        return " ".join(part for part in (*parts, self.convert_tokens_to_string(tokens)) if part)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join pieces into text; bos, eos, unk and pad are spelled out, each first stretch before one is preceded by a space."""
        roles = {self.bos_token, self.eos_token, self.unk_token, self._pad_token}
        text = ""
        stretch: list[str] = []
        is_after_special = True  # the very first token gets no space
        for position, token in enumerate(tokens):
            if token in roles:
                text += ("" if is_after_special else " ") + self.sp_model.decode_pieces(stretch) + token
                stretch, is_after_special = [], True
            else:
                stretch.append(token.removeprefix(_SPACE) if position == 0 else token)
                is_after_special = False
        return text + str(self.sp_model.decode_pieces(stretch))

    def batch_decode(self, rows: Iterable[Iterable[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """Decode each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    # Files

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load tokenizer.model with the added tokens and flags of the folder's JSON files. Raises: CheckpointError."""
        folder = Path(folder)
        config = read_optional_json(folder / "tokenizer_config.json")
        tokenizer = cls(
            folder / _MODEL_NAME,
            add_bos_token=config.get("add_bos_token", True) is not False,
            add_eos_token=config.get("add_eos_token", False) is True,
            padding_side="left" if config.get("padding_side") == "left" else "right",
        )
        tokenizer._add_listed(folder, config)
        for role, own in (("bos_token", tokenizer.bos_token), ("eos_token", tokenizer.eos_token), ("unk_token", tokenizer.unk_token)):
            named = _token_text(config.get(role))
            if named not in (None, own):
                raise CheckpointError(f"{folder}/tokenizer_config.json makes {named!r} the {role}; its sentencepiece model has {own!r}")
        pad = _token_text(config.get("pad_token"))
        if pad is not None:
            tokenizer.add_special_tokens({"pad_token": pad})
        limit = config.get("model_max_length")
        tokenizer.model_max_length = int(limit) if isinstance(limit, int | float) else _UNLIMITED
        return tokenizer

    def _add_listed(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Add what added_tokens.json and added_tokens_decoder list; entries that are pieces of the model must agree with it."""
        listed: dict[str, Any] = read_optional_json(folder / "added_tokens.json")
        try:
            decoder = {_token_text(entry) or "": index for index, entry in config.get("added_tokens_decoder", {}).items()}
            entries = {(int(index), token) for token, index in (*listed.items(), *decoder.items())}
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: the added tokens must be a table of tokens and ids") from error
        for index, token in sorted(entries):
            if not 0 <= index < self.vocab_size:
                self._add(token, index)
            elif self.convert_ids_to_tokens(index) != token:
                raise CheckpointError(f"{folder}: added token {token!r} has id {index}, which is {self.convert_ids_to_tokens(index)!r}")

    def files(self) -> dict[str, bytes]:
        """Build every file of the tokenizer by name, so that transformers 4.x and 5.x load equal ids."""
        specials = {self.unk_token: self.unk_token_id, self.bos_token: self.bos_token_id, self.eos_token: self.eos_token_id}
        entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, "unk_token": self.unk_token, "pad_token": self._pad_token}
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": {str(index): {"content": token, **entry} for token, index in {**specials, **self.added_tokens}.items()},
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            **names,
            "legacy": True,
            "clean_up_tokenization_spaces": False,
            "padding_side": self.padding_side,
            "model_max_length": self.model_max_length,
        }
        fast = tokenizer_json(self.sp_model, self.added_tokens, add_bos=self.add_bos_token, add_eos=self.add_eos_token)
        return {
            _MODEL_NAME: self._proto,
            "tokenizer.json": fast.encode(),
            "tokenizer_config.json": json_bytes(config),
            "special_tokens_map.json": json_bytes({role: token for role, token in names.items() if token is not None}),
            **({"added_tokens.json": json_bytes(self.added_tokens)} if self.added_tokens else {}),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write files() into a folder, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (folder / name).write_bytes(data)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str]:
        """Write the sentencepiece model as [prefix-]tokenizer.model into an existing folder and return its path. Raises: InputError."""
        if not Path(save_directory).is_dir():
            raise InputError(f"{save_directory} is not a folder; make it first")
        path = Path(save_directory) / (_MODEL_NAME if filename_prefix is None else f"{filename_prefix}-{_MODEL_NAME}")
        path.write_bytes(self._proto)
        return (str(path),)


def _read_model(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; copy the checkpoint's sentencepiece model there (a tokenizer.json alone is not enough)")
    try:
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_MODEL_BYTES} bytes; a tokenizer never is")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def _load_model(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise CheckpointError("tokenizer.model is not a sentencepiece model; download it again") from error
    if not proto or min(model.bos_id(), model.eos_id(), model.unk_id()) < 0:
        raise CheckpointError("tokenizer.model lacks a bos, eos or unk piece; Llama's tokenizers have all three")
    return model


def _token_text(entry: Any) -> str | None:
    """Return a token that is written as a string or as a table with "content"; None where there is none."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None
