"""Tokenizers in GGUF metadata, both ways: sentencepiece's (called llama there) and byte-level BPE (called gpt2).

Owns: tokenizer_files and token_values, role_id, end_ids. Refuses: other kinds, ways to cut text into words that are not known here.
Invariant: every row of the embedding has an entry; rows without a token are called [PADn] and are unused, and are no tokens when read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import AddedToken

from llavakit.checkpoint.original import IMAGE_TOKEN
from llavakit.errors import CheckpointError, ConfigError
from llavakit.processing.tokenizer.added_tokens import entry_of_token
from llavakit.processing.tokenizer.byte_level import ByteLevelPieces
from llavakit.processing.tokenizer.fast import JSON_NAME, LlamaTokenizerFast
from llavakit.processing.tokenizer.sentence_model import MODEL_NAME
from llavakit.processing.tokenizer.sentence_pieces import Piece, PieceType, SentencePieces
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.documents import json_bytes
from llavakit.storage.gguf_file import GgufFile

__all__ = ["end_ids", "role_id", "token_values", "tokenizer_files"]

_ROLES = {"unk_token": "unknown", "bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
_USUAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_SENTENCEPIECE, _BYTE_LEVEL = "llama", "gpt2"
_OWN = (PieceType.NORMAL, PieceType.BYTE)
_MAX_SCORE = 1e30
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0


def role_id(file: GgufFile, role: str) -> int | None:
    """Return the id of a role's token. Raises: CheckpointError where there is no such token."""
    return _token_id(file, _ROLES[role])


def end_ids(file: GgufFile) -> list[int]:
    """Return the ids that end an answer: eos, and the end of a turn where that is another one. Raises: CheckpointError."""
    found = [_token_id(file, name) for name in ("eos", "eot")]
    return list(dict.fromkeys(index for index in found if index is not None))


def _token_id(file: GgufFile, name: str) -> int | None:
    index = file.value(f"tokenizer.ggml.{name}_token_id", int)
    num_tokens = len(file.texts("tokenizer.ggml.tokens"))
    if index is not None and num_tokens and not 0 <= index < num_tokens:
        raise CheckpointError(f"{file.path} makes {index} the {name} token, but there are {num_tokens} tokens")
    return index


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """Build tokenizer.model or tokenizer.json, and tokenizer_config.json. Raises: CheckpointError."""
    kind = file.stated("tokenizer.ggml.model", str)
    texts, types = file.texts("tokenizer.ggml.tokens"), file.integers("tokenizer.ggml.token_type")
    if not texts or len(texts) != len(types) or not set(types) <= set(PieceType):
        raise CheckpointError(f"{file.path} has {len(texts)} tokens and {len(types)} types, or types that do not exist")
    roles = {role: role_id(file, role) for role in _ROLES}
    settings = {
        **{role: None if index is None else texts[index] for role, index in roles.items()},
        "chat_template": file.value("tokenizer.chat_template", str),
    }
    match kind:
        case "llama":
            return _sentencepiece_files(file, texts, types, roles, settings)
        case "gpt2":
            return _byte_level_files(file, texts, types, settings)
    raise CheckpointError(f"{file.path} has a tokenizer of the kind {kind!r}; {_SENTENCEPIECE} and {_BYTE_LEVEL} are read")


def _sentencepiece_files(
    file: GgufFile, texts: list[str], types: list[int], roles: Mapping[str, int | None], settings: Mapping[str, Any]
) -> dict[str, bytes]:
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(texts) or not all(abs(score) < _MAX_SCORE for score in scores):
        raise CheckpointError(f"{file.path} has {len(texts)} tokens and {len(scores)} scores, or scores that do not exist")
    found = [_own_role(texts, types, roles[role], usual) for role, usual in _USUAL.items()]
    ids = [index for index in found if index is not None]
    if len(ids) < len(found):
        raise CheckpointError(f"{file.path} has no unk, bos or eos token, which Llama's tokenizers have")
    num_pieces = 1 + max(_last_own(types), *ids)
    pieces = tuple(Piece(*entry) for entry in zip(texts[:num_pieces], scores[:num_pieces], types[:num_pieces], strict=True))
    has_dummy_space = file.value("tokenizer.ggml.add_space_prefix", bool) is not False
    values = {
        **settings,
        **({} if roles["unk_token"] is not None else {"unk_token": texts[ids[0]]}),
        "add_bos_token": file.value("tokenizer.ggml.add_bos_token", bool) is not False,
        "add_eos_token": file.value("tokenizer.ggml.add_eos_token", bool) is True,
        "added_tokens_decoder": {str(index): entry_of_token(token) for index, token in _added(texts, types, ids).items()},
    }
    return {MODEL_NAME: SentencePieces(pieces, has_dummy_space).to_model(ids), "tokenizer_config.json": json_bytes(values)}


def _byte_level_files(file: GgufFile, texts: list[str], types: list[int], settings: Mapping[str, Any]) -> dict[str, bytes]:
    name = file.value("tokenizer.ggml.pre", str)
    kind = ByteLevelPieces.kind_of(name)
    if kind is None:
        raise CheckpointError(f"{file.path} cuts text into words in the way {name!r} (tokenizer.ggml.pre), which is not read")
    num_own = 1 + _last_own(types)
    vocab = {text: index for index, text in enumerate(texts[:num_own])}
    if len(vocab) < num_own:
        raise CheckpointError(f"{file.path} has the same token twice")
    pieces = ByteLevelPieces(kind, vocab, tuple(file.texts("tokenizer.ggml.merges")), _added(texts, types))
    stated = file.value("tokenizer.ggml.add_bos_token", bool)
    bos = settings["bos_token"] if stated or (stated is None and pieces.has_bos) else None
    values = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {JSON_NAME: pieces.to_json(bos).encode(), "tokenizer_config.json": json_bytes(values)}


def _own_role(texts: list[str], types: list[int], stated: int | None, usual: str) -> int | None:
    """Return which of the model's own tokens holds a role: the one that is stated, or the usual one where that was added later."""
    usual_id = texts.index(usual) if usual in texts else None
    kinds = (PieceType.UNKNOWN, PieceType.CONTROL)
    last = _last_own(types)
    return next((index for index in (stated, usual_id) if index is not None and index <= last and types[index] in kinds), None)


def _last_own(types: list[int]) -> int:
    """Return the last id of the model's own tokens."""
    return max((index for index, kind in enumerate(types) if kind in _OWN), default=0)


def _added(texts: list[str], types: list[int], roles: Collection[int] = ()) -> dict[int, AddedToken]:
    """Return the added tokens: what is neither the model's own, roles included, nor unused."""
    return {
        index: AddedToken(texts[index], normalized=False, special=types[index] == PieceType.CONTROL or texts[index] == IMAGE_TOKEN)
        for index in range(len(texts))
        if types[index] not in (*_OWN, PieceType.UNUSED) and index not in roles
    }


def token_values(words: LlamaTokenizer | LlamaTokenizerFast, num_rows: int) -> dict[str, Any]:
    """Describe a tokenizer, with an entry for each row. Raises: ConfigError for one that GGUF files cannot hold."""
    entries, values = _sentencepiece_entries(words) if isinstance(words, LlamaTokenizer) else _byte_level_entries(words)
    for index, token in words.added_tokens_decoder.items():
        text, score, kind = entries.get(index, (token.content, _ADDED_SCORE, PieceType.NORMAL))
        if kind != PieceType.UNKNOWN:
            entries[index] = text, score, PieceType.CONTROL if token.special else PieceType.USER_DEFINED
    rows = [entries.get(index, (f"[PAD{index}]", _PAD_SCORE, PieceType.UNUSED)) for index in range(num_rows)]
    held = {name: words.role(role) for role, name in _ROLES.items()}
    ids = {name: words.find_token(text) for name, text in held.items() if text is not None}
    return {
        **values,
        "tokenizer.ggml.tokens": [text for text, _, _ in rows],
        **({"tokenizer.ggml.scores": [score for _, score, _ in rows]} if isinstance(words, LlamaTokenizer) else {}),
        "tokenizer.ggml.token_type": [int(kind) for _, _, kind in rows],
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None and index < num_rows},
    }


_Entries = dict[int, tuple[str, float, int]]


def _sentencepiece_entries(words: LlamaTokenizer) -> tuple[_Entries, dict[str, Any]]:
    model = SentencePieces.of_model(words.model_file)
    if not model.is_llama:
        raise ConfigError("GGUF files hold sentencepiece BPE models that leave a text as it is; this model's tokenizer is another one")
    values = {
        "tokenizer.ggml.model": _SENTENCEPIECE,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": model.has_dummy_space,
    }
    return {index: (piece.text, piece.score, piece.type) for index, piece in enumerate(model.pieces)}, values


def _byte_level_entries(words: LlamaTokenizerFast) -> tuple[_Entries, dict[str, Any]]:
    model = ByteLevelPieces.of_json(words.files()[JSON_NAME].decode())
    values = {
        "tokenizer.ggml.model": _BYTE_LEVEL,
        "tokenizer.ggml.pre": model.kind,
        "tokenizer.ggml.merges": list(model.merges),
    }
    return {index: (text, 0.0, PieceType.NORMAL) for text, index in model.vocab.items() if index not in model.added}, values
