"""Byte-level BPE tokenizers as GGUF files describe them: tokens, merges, and the name of a way to cut text into words.

Owns: ByteLevelPieces, read from a tokenizer.json and written as one. Refuses: ways to cut text other than Llama-3's and Qwen2's.
Source: llama-vocab.cpp of llama.cpp (names, expressions, ignore_merges); the tokenizer.json of Llama-3 and of Qwen2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from llavakit.errors import ConfigError
from llavakit.processing.tokenizer.added_tokens import entry_of_token, token_of_entry

__all__ = ["ByteLevelPieces"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3, _QWEN_2 = "llama-bpe", "qwen2"
_WORDS: Mapping[str, str] = {
    _LLAMA_3: _CONTRACTIONS + r"\p{N}{1,3}" + _REST,
    _QWEN_2: _CONTRACTIONS + r"\p{N}" + _REST,
}
_NAMES: Mapping[str, str] = {_LLAMA_3: _LLAMA_3, "llama3": _LLAMA_3, "llama-v3": _LLAMA_3, _QWEN_2: _QWEN_2}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@dataclass(frozen=True, slots=True)
class ByteLevelPieces:
    """What such a tokenizer consists of."""

    kind: str
    """llama.cpp's name of the way to cut text into words."""
    vocab: Mapping[str, int]
    """Ids of the model's own tokens."""
    merges: tuple[str, ...]
    """Pairs with a space in between, the first ones first."""
    added: Mapping[int, AddedToken]
    """Tokens that are cut out of a text before, by id."""

    @classmethod
    def of_json(cls, text: str) -> ByteLevelPieces:
        """Read a tokenizer.json that the tokenizers library has loaded. Raises: ConfigError for another kind."""
        document = json.loads(text)
        model = document["model"]
        kind = next((name for name, words in _WORDS.items() if _words(document) == words), None)
        if kind is None or bool(model.get("ignore_merges")) != (kind == _LLAMA_3):
            raise ConfigError("GGUF files hold tokenizers of sentencepiece, Llama-3 and Qwen2; this model's is another one")
        merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        added = {entry["id"]: token for entry in document["added_tokens"] if (token := token_of_entry(entry)) is not None}
        return cls(kind, model["vocab"], merges, added)

    @staticmethod
    def kind_of(name: str | None) -> str | None:
        """Return the kind that one of llama.cpp's names means, None where it is not read."""
        return None if name is None else _NAMES.get(name)

    @property
    def has_bos(self) -> bool:
        """Whether llama.cpp puts bos before a text where a file does not say."""
        return self.kind == _LLAMA_3

    def to_json(self, bos: str | None) -> str:
        """Write a tokenizer.json; bos is the token that comes first."""
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, **entry_of_token(token)} for index, token in sorted(self.added.items())],
            "normalizer": {"type": "NFC"} if self.kind == _QWEN_2 else None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": _WORDS[self.kind]}, "behavior": "Isolated", "invert": False},
                    _BYTE_LEVEL,
                ],
            },
            "post_processor": _BYTE_LEVEL if bos is None else _template(bos, self._id(bos)),
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "ignore_merges": self.kind == _LLAMA_3,
                "vocab": dict(self.vocab),
                "merges": list(self.merges),
            },
        }  # fmt: skip
        return json.dumps(document, ensure_ascii=False)

    def _id(self, text: str) -> int:
        return next((index for index, token in self.added.items() if token.content == text), self.vocab.get(text, 0))


def _words(document: Mapping[str, Any]) -> str | None:
    """Return the expression that cuts text into words, where that is all that happens before the bytes."""
    steps = (document.get("pre_tokenizer") or {}).get("pretokenizers", [])
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"] or steps[1].get("add_prefix_space"):
        return None
    words: str | None = steps[0]["pattern"].get("Regex")
    return words


def _template(bos: str, index: int) -> dict[str, Any]:
    special, first, second = {"SpecialToken": {"id": bos, "type_id": 0}}, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
