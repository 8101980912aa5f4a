"""LlamaTokenizerFast on the tokenizers library: any byte-level or byte-fallback tokenizer.json, run as it is written.

Owns: the public methods of transformers 4.37's fast tokenizer on such a file (Llama-2, Llama-3, Qwen), or on a tokenizer.model
that is converted. Refuses: files whose decoder is of another kind; transformers' normalising of ids beyond the file.
Deviations from 4.37, which raises or returns None there: get_special_tokens_mask of raw ids, save_vocabulary without a folder,
ids outside the vocabulary. create_token_type_ids_from_sequences counts the special tokens, as its documentation says and as calls
do; tokenize returns tokens of the vocabulary where 4.37 returns the stretch of text that an added token took.
The file's own post-processor stays until a flag is set or update_post_processor is called.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import tokenizers
from tokenizers import AddedToken

from llavakit.errors import CheckpointError, InputError
from llavakit.processing.tokenizer.added_tokens import AddedTokens, Numbered, in_order, special_token
from llavakit.processing.tokenizer.batch import Side
from llavakit.processing.tokenizer.fast_json import check_json, portable_json, template_processor, tokenizer_json
from llavakit.processing.tokenizer.frame import Frame, frame_of_flags, frame_of_json
from llavakit.processing.tokenizer.sentence_model import MODEL_NAME, SentenceModel, read_model, save_model
from llavakit.processing.tokenizer.settings import Settings, TokenizerOptions, assign_roles, read_settings, settings_files, split_options
from llavakit.processing.tokenizer.text_bytes import bytes_of_byte_level
from llavakit.processing.tokenizer.texts import UNLIMITED, TextTokenizer, check_text
from llavakit.storage.documents import parse_json, read_text
from llavakit.storage.hub import resolve_model

__all__ = ["JSON_NAME", "LlamaTokenizerFast"]

JSON_NAME = "tokenizer.json"
_SPACE = "▁"
_USUAL_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


class LlamaTokenizerFast(TextTokenizer):
    """A tokenizer.json with the roles of its special tokens; rows are padded on the left unless told otherwise."""

    is_fast = True

    def __init__(
        self,
        vocab_file: str | Path | bytes | None = None,
        tokenizer_file: str | Path | bytes | None = None,
        *,
        clean_up_tokenization_spaces: bool = False,
        unk_token: str | AddedToken | None = "<unk>",
        bos_token: str | AddedToken | None = "<s>",
        eos_token: str | AddedToken | None = "</s>",
        pad_token: str | AddedToken | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        use_default_system_prompt: bool = False,
        added_tokens: Numbered | None = None,
        additional_special_tokens: Sequence[str | AddedToken] = (),
        padding_side: Side = "left",
        truncation_side: Side = "right",
        model_max_length: int = UNLIMITED,
        split_special_tokens: bool = False,
        legacy: bool | None = None,  # noqa: ARG002 - a file's rule is what it says
    ) -> None:
        """Load tokenizer.json, or convert tokenizer.model; each a path or the file's bytes.

        The usual <unk>, <s> and </s> hold their roles where the vocabulary has them, in a converted tokenizer.model else its own
        tokens; other names are added where they are missing. legacy is taken and changes nothing, as in 4.37.
        add_bos_token and add_eos_token None leave tokenizer.json's own post-processor (from tokenizer.model: bos only).
        Raises: CheckpointError when a file cannot be used, InputError when there is none or a flag lacks its token.
        """
        super().__init__(
            padding_side=padding_side,
            truncation_side=truncation_side,
            model_max_length=model_max_length,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            split_special_tokens=split_special_tokens,
        )
        self._proto = None if vocab_file is None else _read_bytes(vocab_file)
        own: dict[str, str] = {}
        if tokenizer_file is not None:
            text = _read_json(tokenizer_file)
        elif self._proto is not None:
            text, own = _converted(self._proto)
            add_bos_token = add_bos_token is None or add_bos_token
        else:
            raise InputError("LlamaTokenizerFast needs vocab_file (tokenizer.model) or tokenizer_file (tokenizer.json)")
        self.use_default_system_prompt = use_default_system_prompt
        self.config: dict[str, Any] = {}
        self._load(text)
        self._put_added(added_tokens or {})
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        given = {role: token for role, token in named.items() if token is not None and self._is_wanted(role, token)}
        self.add_special_tokens({**own, **given})
        self.add_special_tokens({"additional_special_tokens": additional_special_tokens})
        self._read_flags()
        if add_bos_token is not None or add_eos_token is not None:
            add_bos = self.add_bos_token if add_bos_token is None else add_bos_token
            self._set_flags(add_bos=add_bos, add_eos=self.add_eos_token if add_eos_token is None else add_eos_token)

    def _load(self, text: str) -> None:
        document = parse_json(text, JSON_NAME)
        check_json(document, JSON_NAME)
        document |= {"truncation": None, "padding": None}
        self.backend_tokenizer = _backend(document)
        self._kind = _Kind(document)
        self._framing = frame_of_json(document.get("post_processor"))
        self._read_added()

    def _is_wanted(self, role: str, token: str | AddedToken) -> bool:
        return token != _USUAL_ROLES.get(role) or self.find_token(str(token)) is not None

    def _put_added(self, tokens: Numbered) -> None:
        for index, token in in_order(tokens):
            if self._added.token(index) != token:
                self._register([token])
            if self.find_token(token.content) != index:
                have = self.find_token(token.content)
                raise CheckpointError(f"added token {token.content!r} should have id {index}; {JSON_NAME} gives it {have}")

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Entries of the model, added tokens not counted."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    def _piece_id(self, token: str) -> int | None:
        index: int | None = self.backend_tokenizer.token_to_id(token)
        return index

    def _piece(self, index: int) -> str | None:
        piece: str | None = self.backend_tokenizer.id_to_token(index) if 0 <= index < 1 << 32 else None
        return piece

    def _register(self, tokens: Sequence[AddedToken]) -> None:
        for token in tokens:
            (self.backend_tokenizer.add_special_tokens if token.special else self.backend_tokenizer.add_tokens)([token])
        self._read_added()

    def _read_added(self) -> None:
        self._added = AddedTokens()
        for index, token in self.backend_tokenizer.get_added_tokens_decoder().items():
            self._added.put(token, index)

    # Text to ids

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text: no added token is looked for, a typed <|im_end|> stays text. Raises: PromptError for half a surrogate pair."""
        return list(self._plain.encode(check_text(text), add_special_tokens=False).ids)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same model without a single added token."""
        document = json.loads(self.backend_tokenizer.to_str())
        return _backend(document | {"added_tokens": [], "post_processor": None})

    def _encode_marked(self, text: str) -> list[int]:
        if self.split_special_tokens:
            return self.encode_text(text)
        return list(self.backend_tokenizer.encode(check_text(text), add_special_tokens=False).ids)

    # Special tokens around ids

    def _frame(self) -> Frame:
        return self._framing

    @property
    def add_bos_token(self) -> bool:
        """Whether bos comes first; setting it rebuilds the post-processor. Raises: InputError."""
        return self._add_bos

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        """Rebuild the post-processor."""
        self._set_flags(add_bos=value, add_eos=self.add_eos_token)

    @property
    def add_eos_token(self) -> bool:
        """Whether eos comes last; setting it rebuilds the post-processor. Raises: InputError."""
        return self._add_eos

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        """Rebuild the post-processor."""
        self._set_flags(add_bos=self.add_bos_token, add_eos=value)

    def update_post_processor(self) -> None:
        """Rebuild the post-processor from the present bos, eos and flags; call it after assigning bos_token or eos_token."""
        self._set_flags(add_bos=self._add_bos, add_eos=self._add_eos)

    def _read_flags(self) -> None:
        """Take the flags from the file's post-processor."""
        self._add_bos = self.bos_token_id is not None and self.bos_token_id in self._framing.head
        self._add_eos = self.eos_token_id is not None and self.eos_token_id in self._framing.tail

    def _set_flags(self, *, add_bos: bool, add_eos: bool) -> None:
        bos, eos = self.bos_token_id, self.eos_token_id
        if (add_bos and bos is None) or (add_eos and eos is None):
            have = f"bos_token={self.bos_token!r} and eos_token={self.eos_token!r}"
            raise InputError(f"add_bos_token={add_bos} and add_eos_token={add_eos} need such tokens; the tokenizer has {have}")
        self._add_bos, self._add_eos = add_bos, add_eos
        self._framing = frame_of_flags(bos if add_bos else None, eos if add_eos else None)
        names = {index: self.convert_ids_to_tokens(index) for index in (bos, eos) if index is not None}
        self.backend_tokenizer.post_processor = template_processor(self._framing, names)

    # Ids to text

    @property
    def replaces_each_byte(self) -> bool:
        """Each bad byte of an answer is U+FFFD in byte-fallback files, as in sentencepiece; each run of them in byte-level ones."""
        return not self._kind.is_byte_level

    def text_bytes(self, index: int, *, is_first: bool = False) -> bytes | None:
        """Return the bytes that an id adds to an answer; None for a special token and an id outside the vocabulary."""
        added = self._added.token(index)
        if added is not None:
            content: str = added.content
            return None if added.special else content.encode()
        piece = self._piece(index)
        return None if piece is None else self._kind.bytes_of(piece, is_first=is_first)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens into text by the file's decoder."""
        return str(self.backend_tokenizer.decoder.decode(list(tokens)))

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> str:
        del spaces_between_special_tokens  # the decoder of the file decides
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(index for index in ids if index not in skipped))

    # Files

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Unpack[TokenizerOptions]) -> Self:
        """Load tokenizer.json, or else tokenizer.model, with the roles, tokens and flags of a folder's or hub id's JSON files.

        Options are the constructor's keywords, which come before what the files say, and those that say where on the hub to look.
        Raises: CheckpointError, and InputError for an unknown option.
        """
        hub, overrides = split_options(cls.__name__, options)
        folder = resolve_model(model, parts="processor", **hub)
        settings = read_settings(folder, overrides)
        has_json, has_model = (folder / JSON_NAME).is_file(), (folder / MODEL_NAME).is_file()
        if not has_json and not has_model:
            raise CheckpointError(f"{folder} has neither {JSON_NAME} nor {MODEL_NAME}; copy the tokenizer's files there")
        bos, eos = (_flag(settings, name) for name in ("add_bos_token", "add_eos_token"))
        usual = {role: token for role, token in _USUAL_ROLES.items() if role not in settings.roles}
        tokenizer = cls(
            folder / MODEL_NAME if has_model else None,
            folder / JSON_NAME if has_json else None,
            clean_up_tokenization_spaces=settings.flag("clean_up_tokenization_spaces", default=False),
            unk_token=usual.get("unk_token"),
            bos_token=usual.get("bos_token"),
            eos_token=usual.get("eos_token"),
            use_default_system_prompt=settings.flag("use_default_system_prompt", default=False),
            added_tokens=settings.added,
            padding_side=settings.side("padding_side", default="left"),
            truncation_side=settings.side("truncation_side", default="right"),
            model_max_length=settings.model_max_length,
            split_special_tokens=settings.flag("split_special_tokens", default=False),
        )
        tokenizer.config = dict(settings.config)
        assign_roles(tokenizer, settings)
        if has_json:
            tokenizer._read_flags()
        if not has_json or bos is not None or eos is not None:
            add_bos = tokenizer.add_bos_token if bos is None else bos
            tokenizer._set_flags(add_bos=add_bos, add_eos=tokenizer.add_eos_token if eos is None else eos)
        return tokenizer

    def files(self) -> dict[str, bytes]:
        """Build every file of the tokenizer by name; tokenizer.model too where it was given."""
        own = {
            "tokenizer_class": "PreTrainedTokenizerFast" if self._kind.is_byte_level else "LlamaTokenizerFast",
            **self.config,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "use_default_system_prompt": self.use_default_system_prompt,
        }
        if own["tokenizer_class"] in _LLAMA_CLASSES:
            own["legacy"] = True  # what transformers 5 makes of the file otherwise is another tokenizer
        return {
            **({} if self._proto is None else {MODEL_NAME: self._proto}),
            JSON_NAME: portable_json(self.backend_tokenizer).encode(),
            **settings_files(self, own),
        }

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str]:
        """Write the sentencepiece model as [prefix-]tokenizer.model into an existing folder and return its path. Raises: InputError."""
        if self._proto is None:
            raise InputError(f"this tokenizer was made from {JSON_NAME} and has no sentencepiece model; use save_pretrained")
        return save_model(self._proto, Path(save_directory), filename_prefix)


class _Kind:
    """What a tokenizer.json's pieces mean in bytes, from its decoder."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        decoder, model = document.get("decoder"), document.get("model")
        parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
        kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)}
        self.is_byte_level = "ByteLevel" in kinds
        self._has_bytes = isinstance(model, dict) and model.get("byte_fallback") is True
        self._has_dummy_space = "Metaspace" in kinds or {"type": "Strip", "content": " ", "start": 1, "stop": 0} in parts
        if not self.is_byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            found = ", ".join(sorted(kinds))
            raise CheckpointError(f"{JSON_NAME} has a decoder of the kind {found!r}; expected ByteLevel, or ByteFallback with ▁ for spaces")

    def bytes_of(self, piece: str, *, is_first: bool) -> bytes:
        if self.is_byte_level:
            return bytes_of_byte_level(piece)
        if self._has_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes((int(piece[3:5], 16),))
        if is_first and self._has_dummy_space:
            piece = piece.removeprefix(_SPACE)
        return piece.replace(_SPACE, " ").encode()


def _flag(settings: Settings, name: str) -> bool | None:
    """Return a flag where the files are of Llama's classes, which heed it; the others follow their tokenizer.json alone."""
    is_heeded = name in settings.overrides or settings.config.get("tokenizer_class") in _LLAMA_CLASSES
    return settings.flag(name, default=False) if is_heeded and settings.value(name) is not None else None


def _backend(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(json.dumps(document).encode())  # from_str raises a bare Exception
    except ValueError as error:
        raise CheckpointError(f"{JSON_NAME} cannot be used: {error}") from error


def _read_bytes(vocab_file: str | Path | bytes) -> bytes:
    return vocab_file if isinstance(vocab_file, bytes) else read_model(Path(vocab_file))


def _read_json(tokenizer_file: str | Path | bytes) -> str:
    if not isinstance(tokenizer_file, bytes):
        return read_text(Path(tokenizer_file))
    try:
        return tokenizer_file.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{JSON_NAME} is not UTF-8: {error}") from error


def _converted(proto: bytes) -> tuple[str, dict[str, str]]:
    """Convert a sentencepiece model to tokenizer.json, with the tokens that hold its own roles."""
    model = SentenceModel(proto, {})
    own = model.own_roles()
    added = AddedTokens()
    for token in own.values():
        index = model.find(token)
        assert index is not None, "a model's own roles are its pieces"
        added.put(special_token(token), index)
    return tokenizer_json(model, added, frame_of_flags(model.find(own["bos_token"]), None)), own
