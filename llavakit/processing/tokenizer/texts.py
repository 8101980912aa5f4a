"""What the slow and the fast tokenizer do alike with texts: calls, batches, pairs, padding, decoding of answers.

Owns: TextTokenizer, the public methods built on a few that a subclass provides. There are two ways in and two ways out:
encode() and decode() treat special tokens in text as transformers does; encode_text() and decode_text() know no special token
at all, and are what prompts and answers are made with.
Refuses: words that are split already, overflowing tokens, offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from llavakit.errors import InputError, PromptError
from llavakit.processing.tokenizer.batch import (
    Batch,
    Bounds,
    Padder,
    Padding,
    Side,
    TensorKind,
    Truncation,
    resolve_bounds,
    rows_of,
    truncate,
)
from llavakit.processing.tokenizer.frame import Frame, Framed
from llavakit.processing.tokenizer.text_bytes import ByteText
from llavakit.processing.tokenizer.vocabulary import Vocabulary

__all__ = ["UNLIMITED", "TextTokenizer", "check_text"]

UNLIMITED = int(1e30)
"""A model_max_length that says that none is known, in transformers' words."""

Ids = int | Iterable[int] | Tensor | np.ndarray[Any, Any]


class TextTokenizer(Vocabulary):
    """The texts' half of the public tokenizers."""

    model_input_names = ("input_ids", "attention_mask")
    is_fast: bool

    def __init__(
        self,
        *,
        padding_side: Side,
        truncation_side: Side,
        model_max_length: int,
        clean_up_tokenization_spaces: bool,
        split_special_tokens: bool,
    ) -> None:
        super().__init__()
        for name, side in (("padding_side", padding_side), ("truncation_side", truncation_side)):
            if side not in ("left", "right"):
                raise InputError(f'{name} must be "left" or "right", got {side!r}')
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.model_max_length = model_max_length
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens

    # What a subclass provides

    @property
    def replaces_each_byte(self) -> bool:
        """Whether each bad byte of an answer is U+FFFD, or each run of them."""
        raise NotImplementedError

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text: no token is special, a typed </s> stays text. Raises: PromptError for half a surrogate pair."""
        raise NotImplementedError

    def text_bytes(self, index: int, *, is_first: bool = False) -> bytes | None:
        """Return the bytes that an id adds to an answer; None for a special token and an id outside the vocabulary.

        is_first is said of the first id that is text; sentencepiece's dummy space is left out there.
        """
        raise NotImplementedError

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens into text."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """Build every file of the tokenizer by name."""
        raise NotImplementedError

    def _frame(self) -> Frame:
        raise NotImplementedError

    def _encode_marked(self, text: str) -> list[int]:
        """Encode text in which added tokens mean themselves."""
        raise NotImplementedError

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> str:
        raise NotImplementedError

    # Text to ids

    def tokenize(self, text: str, pair: str | None = None, *, add_special_tokens: bool = False) -> list[str]:
        """Return the tokens of a text, and of its pair behind it; special tokens mean themselves."""
        return self.convert_ids_to_tokens(self._frame_texts(text, pair, add_special_tokens=add_special_tokens).ids)

    @overload
    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        return_tensors: None = None,
    ) -> list[int]: ...
    @overload
    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        return_tensors: Literal["pt"],
    ) -> Tensor: ...
    @overload
    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        return_tensors: Literal["np"],
    ) -> np.ndarray[Any, Any]: ...
    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        return_tensors: TensorKind | None = None,
    ) -> list[int] | Tensor | np.ndarray[Any, Any]:
        """Return only the input_ids of a call; arrays are [1, T]."""
        batch = self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        ids: list[int] | Tensor | np.ndarray[Any, Any] = batch["input_ids"]
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: TensorKind | None = None,
        return_token_type_ids: bool = False,
        return_attention_mask: bool = True,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
    ) -> Batch:
        """Encode a text, a pair, or a batch of either, in which special tokens mean themselves.

        max_length without padding cuts; special tokens of the frame are never cut. One text without return_tensors gives flat lists.
        Raises: InputError for arguments that contradict each other, or rows of different lengths that should become an array.
        """
        bounds = self._bounds(padding, truncation, max_length, pad_to_multiple_of)
        texts, pairs = _listed_texts(text, text_pair)
        framed = [
            self._frame_texts(first, second, add_special_tokens=add_special_tokens, bounds=bounds)
            for first, second in zip(texts, pairs, strict=True)
        ]
        columns = {"input_ids": [row.ids for row in framed]}
        if return_token_type_ids:
            columns["token_type_ids"] = [row.type_ids for row in framed]
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = [row.special_mask for row in framed]
        if return_attention_mask:
            columns["attention_mask"] = [[1] * len(row.ids) for row in framed]
        batch = self._padded(columns, bounds)
        if return_length:
            batch["length"] = [len(row.ids) for row in framed]
        if return_tensors is not None:
            return batch.to_arrays(return_tensors)
        return batch.first_row() if isinstance(text, str) else batch

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: Padding = True,
        *,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool = True,
        return_tensors: TensorKind | None = None,
    ) -> Batch:
        """Pad what calls returned: one batch, one row, or a list of rows. Raises: InputError."""
        columns, is_single = rows_of(encoded_inputs)
        if return_attention_mask:
            columns.setdefault("attention_mask", [[1] * len(row) for row in columns["input_ids"]])
        batch = self._padded(columns, self._bounds(padding, None, max_length, pad_to_multiple_of))
        if return_tensors is not None:
            return batch.to_arrays(return_tensors)
        return batch.first_row() if is_single else batch

    def _bounds(self, padding: Padding, truncation: Truncation | None, max_length: int | None, multiple: int | None) -> Bounds:
        return resolve_bounds(
            padding=padding, truncation=truncation, max_length=max_length, multiple=multiple, model_max_length=self.model_max_length
        )

    def _padded(self, columns: Mapping[str, list[list[int]]], bounds: Bounds) -> Batch:
        if bounds.padding is None:
            return Batch(columns)
        pad_id = self.pad_token_id
        if pad_id is None:
            raise InputError('padding needs a pad token; add one with add_special_tokens({"pad_token": "<pad>"})')
        return Batch(Padder(pad_id, self.padding_side).fill(columns, bounds))

    def _frame_texts(self, text: str, pair: str | None, *, add_special_tokens: bool, bounds: Bounds | None = None) -> Framed:
        first = self._encode_marked(text)
        second = None if pair is None else self._encode_marked(pair)
        frame = self._frame() if add_special_tokens else Frame.plain()
        if bounds is not None and bounds.truncation is not None and bounds.max_length is not None:
            length = len(first) + len(second or ()) + frame.num_special(is_pair=second is not None)
            first, second = truncate(
                first,
                second,
                excess=length - bounds.max_length,
                strategy=bounds.truncation,
                side=self.truncation_side,
                favours_longer=self.is_fast,
            )
        return frame.build(first, second)

    # Special tokens around ids

    def build_inputs_with_special_tokens(self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None) -> list[int]:
        """Put the special tokens around one or two sequences: bos before and eos after each, where the flags ask for them."""
        return self._frame().build(token_ids_0, token_ids_1).ids

    def get_special_tokens_mask(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mark with 1 where build_inputs_with_special_tokens puts special tokens, or where ids that have them hold one.

        Raises: InputError for a second sequence beside ids that already have their special tokens.
        """
        if not already_has_special_tokens:
            return self._frame().build(token_ids_0, token_ids_1).special_mask
        if token_ids_1 is not None:
            raise InputError("ids that already have their special tokens are one sequence; pass them as token_ids_0 alone")
        specials = self.special_ids.union(self.all_special_ids)
        return [int(index in specials) for index in token_ids_0]

    def create_token_type_ids_from_sequences(self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None) -> list[int]:
        """Return 0 for the first sequence and 1 for the second, special tokens included with their sequence."""
        return self._frame().build(token_ids_0, token_ids_1).type_ids

    def num_special_tokens_to_add(self, *, pair: bool = False) -> int:
        """Count the special tokens that a call adds to one or two sequences."""
        return self._frame().num_special(is_pair=pair)

    # Ids to text

    def decode_text(self, ids: Iterable[int]) -> str:
        """Turn an answer's ids into text; special tokens and ids outside the vocabulary are no text."""
        text, parts = ByteText(replaces_each_byte=self.replaces_each_byte), []
        is_first = True
        for index in ids:
            data = self.text_bytes(index, is_first=is_first)
            if data is not None:
                parts.append(text.push(data))
                is_first = False
        return "".join((*parts, text.flush()))

    def decode(
        self,
        token_ids: Ids,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Turn ids into text as transformers 4.37 does, special tokens included; ids may be a tensor.

        spaces_between_special_tokens says whether added tokens are set off by spaces; the fast tokenizer's file decides that itself.
        Raises: InputError for an id outside the vocabulary.
        """
        text = self._decode(
            _listed_ids(token_ids), skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces_between_special_tokens
        )
        does_clean = self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        return clean_up_tokenization(text) if does_clean else text

    def batch_decode(
        self,
        sequences: Iterable[Ids],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        spaces_between_special_tokens: bool = True,
    ) -> list[str]:
        """Decode each row."""
        return [
            self.decode(
                row,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
            for row in sequences
        ]

    # Files

    def save_pretrained(self, save_directory: str | Path) -> tuple[str, ...]:
        """Write files() into a folder, which is made where it is missing, and return their paths."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return tuple(str(folder / name) for name in files)


def check_text(text: str) -> str:
    """Return the text. Raises: PromptError when it holds half a surrogate pair, which no encoding can express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the text is not valid Unicode at character {error.start}; send whole characters") from error
    return text


def clean_up_tokenization(text: str) -> str:
    """Remove the spaces before English punctuation and shortened words, as transformers does."""
    for ending in (".", "?", "!", ","):
        text = text.replace(f" {ending}", ending)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def _listed_ids(ids: Ids) -> list[int]:
    if isinstance(ids, torch.Tensor | np.ndarray):
        listed = ids.tolist()
        return listed if isinstance(listed, list) else [listed]
    return [int(ids)] if isinstance(ids, int | np.integer) else [int(index) for index in ids]


def _listed_texts(text: str | Sequence[str], pair: str | Sequence[str] | None) -> tuple[list[str], list[str | None]]:
    texts: list[str] = [text] if isinstance(text, str) else list(text)
    pairs: list[str | None] = [None] * len(texts) if pair is None else [pair] if isinstance(pair, str) else list(pair)
    if len(pairs) != len(texts) or (pair is not None and isinstance(pair, str) != isinstance(text, str)):
        raise InputError(f"text and text_pair must both be one text or equally long lists; got {len(texts)} and {len(pairs)}")
    wrong = next((item for item in (*texts, *pairs) if item is not None and not isinstance(item, str)), None)
    if wrong is not None:
        raise InputError(f"a batch is a list of texts, got {type(wrong).__name__} in it; give second texts as text_pair")
    return texts, pairs
