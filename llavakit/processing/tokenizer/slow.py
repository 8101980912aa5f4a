"""LlamaTokenizer on sentencepiece, with the behaviour of transformers 4.37's slow tokenizer.

Owns: both of its rules for text beside special tokens, and its spaces in decoding. Refuses: templates, pictures.
Legacy rule: text is cut at special tokens and each stretch goes to sentencepiece alone, so each gets its own dummy space.
Other rule (legacy=False): only the beginning of the whole text gets a dummy space.
Both give sentencepiece's own ids for text without special tokens, and so does encode_text under either.
Deviations: decode(skip_special_tokens=True) skips added tokens that are special too, as the fast tokenizer does; the
tokenizer.json in files() follows the legacy rule under either, as 4.37's fast tokenizer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from tokenizers import AddedToken

from llavakit.errors import CheckpointError
from llavakit.processing.tokenizer.added_tokens import Numbered, in_order
from llavakit.processing.tokenizer.batch import Side
from llavakit.processing.tokenizer.fast_json import tokenizer_json
from llavakit.processing.tokenizer.frame import Frame, frame_of_flags
from llavakit.processing.tokenizer.sentence_model import MODEL_NAME, SentenceModel, read_model, save_model
from llavakit.processing.tokenizer.settings import TokenizerOptions, assign_roles, read_settings, settings_files, split_options
from llavakit.processing.tokenizer.texts import UNLIMITED, TextTokenizer, check_text
from llavakit.processing.tokenizer.vocabulary import NeededRole, NeededRoleId
from llavakit.storage.hub import resolve_model

__all__ = ["LlamaTokenizer"]

_SPACE = "▁"


class LlamaTokenizer(TextTokenizer):
    """A Llama sentencepiece tokenizer: bos first, byte fallback, no pad token unless one is added."""

    bos_token, eos_token, unk_token = NeededRole(), NeededRole(), NeededRole()
    bos_token_id, eos_token_id, unk_token_id = NeededRoleId(), NeededRoleId(), NeededRoleId()
    is_fast = False

    def __init__(
        self,
        vocab_file: str | Path | bytes,
        unk_token: str | AddedToken | None = None,
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = None,
        pad_token: str | AddedToken | None = None,
        sp_model_kwargs: Mapping[str, Any] | None = None,
        *,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        legacy: bool | None = None,
        added_tokens: Numbered | None = None,
        additional_special_tokens: Sequence[str | AddedToken] = (),
        padding_side: Side = "right",
        truncation_side: Side = "right",
        model_max_length: int = UNLIMITED,
        split_special_tokens: bool = False,
    ) -> None:
        """Load tokenizer.model from a path or its bytes.

        unk, bos and eos are the model's own pieces (<unk>, <s>, </s>) unless named; a named special token that does not exist is
        added. legacy None means True. added_tokens are special tokens with their ids, or tokens with flags by id.
        Raises: CheckpointError when the model is not readable, or an added token's id is taken; ConfigError for sp_model_kwargs.
        """
        super().__init__(
            padding_side=padding_side,
            truncation_side=truncation_side,
            model_max_length=model_max_length,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            split_special_tokens=split_special_tokens,
        )
        self._proto = vocab_file if isinstance(vocab_file, bytes) else read_model(Path(vocab_file))
        self._legacy = legacy is None or legacy
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self._pieces = SentenceModel(self._proto, self.sp_model_kwargs)
        self.sp_model = self._pieces.processor if self.legacy else self._pieces.without_dummy_space()
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self.use_default_system_prompt = use_default_system_prompt
        self.spaces_between_special_tokens = spaces_between_special_tokens
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        given = {role: token for role, token in named.items() if token is not None}
        own = {role: token for role, token in self._pieces.own_roles().items() if role not in given}
        self.add_special_tokens(own)
        self._put_added(added_tokens or {})
        self.add_special_tokens(given)
        self.add_special_tokens({"additional_special_tokens": additional_special_tokens})

    def _put_added(self, tokens: Numbered) -> None:
        for index, token in in_order(tokens):
            if (index < self.vocab_size and self._piece(index) != token.content) or self._piece_id(token.content) not in (None, index):
                raise CheckpointError(f"token {token.content!r} cannot be added with id {index}; the model's pieces say otherwise")
            self._added.put(token, index)

    @property
    def legacy(self) -> bool:
        """Whether each stretch between special tokens gets its own dummy space; chosen when the tokenizer is made."""
        return self._legacy

    @property
    def model_file(self) -> bytes:
        """The contents of tokenizer.model."""
        return self._proto

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces of the model, added tokens not counted."""
        return self._pieces.size

    @property
    def unk_token_length(self) -> int:
        """Pieces that the unk token's text has when it is no special token."""
        return len(self.sp_model.encode(self.unk_token))

    def _piece_id(self, token: str) -> int | None:
        return self._pieces.find(token)

    def _piece(self, index: int) -> str | None:
        return self._pieces.piece(index)

    def _register(self, tokens: Sequence[AddedToken]) -> None:
        for token in tokens:
            index = self.find_token(token.content)
            self._added.put(token, len(self) if index is None else index)
        self._pieces.hide(frozenset(index for index in self._added.ids().values() if index < self.vocab_size))

    # Text to ids

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text: no token is special, a typed </s> stays text; sentencepiece adds its dummy space in front.

        Raises: PromptError when the text holds half a surrogate pair, which no encoding can express.
        """
        return self._pieces.encode(check_text(text))

    def _frame(self) -> Frame:
        return frame_of_flags(self.bos_token_id if self.add_bos_token else None, self.eos_token_id if self.add_eos_token else None)

    def _encode_marked(self, text: str) -> list[int]:
        check_text(text)
        if not self.legacy and text:
            text = _SPACE + text.replace(_SPACE, " ")
        ids: list[int] = []
        for part in [text] if self.split_special_tokens else self._added.cut(text):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._encode_stretch(part)
        is_lone_space = len(ids) > 1 and not self.legacy and ids[0] == self.find_token(_SPACE)
        return ids[1:] if is_lone_space and ids[1] in self.all_special_ids else ids

    def _encode_stretch(self, text: str) -> list[int]:
        """Encode what stands between special tokens.

        Without its dummy space sentencepiece would lose a space in front, so that unk's text stands before it and is dropped.
        """
        if self.legacy or not text.startswith((_SPACE, " ")):
            return list(self.sp_model.encode(text))
        ids = list(self.sp_model.encode(self.unk_token + text))
        return ids[self.unk_token_length :]

    # Ids to text

    @property
    def replaces_each_byte(self) -> bool:
        """Each bad byte of an answer is U+FFFD, as in sentencepiece."""
        return True

    def text_bytes(self, index: int, *, is_first: bool = False) -> bytes | None:
        """Return the bytes that an id adds to an answer; None for a special token and an id outside the vocabulary."""
        added = self._added.token(index)
        if added is not None:
            content: str = added.content
            return None if added.special else content.encode()
        return self._pieces.text_bytes(index, is_first=is_first)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join pieces into text; special tokens are spelled out, under the legacy rule with a space before them."""
        specials = frozenset(self.all_special_tokens)
        text = ""
        stretch: list[str] = []
        is_after_special = True  # the very first token gets no space
        for position, token in enumerate(tokens):
            if token in specials:
                space = " " if self.legacy and not is_after_special else ""
                text += space + self.sp_model.decode_pieces(stretch) + token
                stretch, is_after_special = [], True
            else:
                stretch.append(token.removeprefix(_SPACE) if position == 0 else token)
                is_after_special = False
        return text + str(self.sp_model.decode_pieces(stretch))

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> str:
        apart = self._tokens_apart()
        parts: list[str] = []
        tokens: list[str] = []
        for token in self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens):
            if token in apart:
                parts += (text, token) if (text := self.convert_tokens_to_string(tokens)) else (token,)
                tokens = []
            else:
                tokens.append(token)
        if tokens:
            parts.append(self.convert_tokens_to_string(tokens))
        return (" " if spaces_between_special_tokens else "").join(parts)

    def _tokens_apart(self) -> frozenset[str]:
        """Return the added tokens that are no part of a sentence: those that hold no role."""
        roles = frozenset(self.all_special_tokens)
        late = {token for token in self.additional_special_tokens if self.convert_tokens_to_ids(token) >= self.vocab_size}
        return frozenset((self.added_tokens_encoder.keys() - roles) | late)

    # Files

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Unpack[TokenizerOptions]) -> Self:
        """Load tokenizer.model with the added tokens and flags of a folder's or hub id's JSON files.

        Options are the constructor's keywords, which come before what the files say, and those that say where on the hub to look.
        Raises: CheckpointError, and InputError for an unknown option.
        """
        hub, overrides = split_options(cls.__name__, options)
        folder = resolve_model(model, parts="processor", **hub)
        settings = read_settings(folder, overrides)
        kwargs = settings.value("sp_model_kwargs")
        tokenizer = cls(
            folder / MODEL_NAME,
            sp_model_kwargs=kwargs if isinstance(kwargs, Mapping) else None,
            add_bos_token=settings.flag("add_bos_token", default=True),
            add_eos_token=settings.flag("add_eos_token", default=False),
            clean_up_tokenization_spaces=settings.flag("clean_up_tokenization_spaces", default=False),
            use_default_system_prompt=settings.flag("use_default_system_prompt", default=False),
            spaces_between_special_tokens=settings.flag("spaces_between_special_tokens", default=False),
            legacy=settings.flag("legacy", default=True),
            added_tokens=settings.added,
            padding_side=settings.side("padding_side", default="right"),
            truncation_side=settings.side("truncation_side", default="right"),
            model_max_length=settings.model_max_length,
            split_special_tokens=settings.flag("split_special_tokens", default=False),
        )
        assign_roles(tokenizer, settings)
        return tokenizer

    def files(self) -> dict[str, bytes]:
        """Build every file of the tokenizer by name, so that transformers 4.x and 5.x load equal ids.

        Raises: CheckpointError when the added tokens' ids leave gaps, which tokenizer.json cannot express.
        """
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "legacy": self.legacy,
            "sp_model_kwargs": self.sp_model_kwargs,
            "use_default_system_prompt": self.use_default_system_prompt,
            "spaces_between_special_tokens": self.spaces_between_special_tokens,
        }
        fast = tokenizer_json(self._pieces, self._added, self._frame())
        return {MODEL_NAME: self._proto, "tokenizer.json": fast.encode(), **settings_files(self, config)}

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str]:
        """Write the sentencepiece model as [prefix-]tokenizer.model into an existing folder and return its path. Raises: InputError."""
        return save_model(self._proto, Path(save_directory), filename_prefix)
