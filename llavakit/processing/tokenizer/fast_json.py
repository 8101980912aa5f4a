"""tokenizer.json for a Llama sentencepiece model, so that the tokenizers library gives sentencepiece's ids.

Owns: recovering BPE merges from the scores of the pieces. Merges are ranked by the score of what they make, not by its id:
Llama's all-space pieces have early ids and the lowest scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from llavakit.errors import CheckpointError
from llavakit.processing.tokenizer.added_tokens import AddedTokens
from llavakit.processing.tokenizer.frame import Frame, Slot
from llavakit.processing.tokenizer.sentence_model import SentenceModel

__all__ = ["check_json", "portable_json", "template_processor", "tokenizer_json"]

_MAX_IDS = 1 << 24


def tokenizer_json(model: SentenceModel, added: AddedTokens, frame: Frame) -> str:
    """Build the text of tokenizer.json in the form that Llama-2's has: prepend, byte fallback, special tokens by template.

    Raises: CheckpointError when the added tokens' ids leave gaps, which this file cannot express.
    """
    sp_model = model.processor
    vocab = {str(sp_model.id_to_piece(index)): index for index in range(model.size)}
    bpe = models.BPE(
        vocab=vocab, merges=_merges(sp_model, vocab), unk_token=model.own_roles()["unk_token"], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    names = {index: token.content for index, token in added.tokens().items()}
    tokenizer.post_processor = template_processor(frame, names)
    for index, token in added.tokens().items():
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(
                f"added token {token.content!r} has id {index}; added tokens must follow the {model.size} pieces without a gap"
            )
    return portable_json(tokenizer)


def check_json(document: Mapping[str, Any], source: str) -> None:
    """Refuse what makes the tokenizers library panic or ask for memory without end. Raises: CheckpointError."""
    model, added = document.get("model"), document.get("added_tokens", [])
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), Mapping):
        raise CheckpointError(f"{source} has no BPE model with a vocabulary")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CheckpointError(f"{source} marks pieces inside words, which no Llama or Qwen does")
    if not isinstance(added, list) or not all(isinstance(entry, Mapping) for entry in added):
        raise CheckpointError(f"{source} must list its added_tokens as tables")
    ids = model["vocab"].values()
    for index in (*ids, *(entry.get("id") for entry in added)):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < _MAX_IDS:
            raise CheckpointError(f"{source} has a token with the id {index!r}; expected one from 0 to {_MAX_IDS - 1}")
    if len(set(ids)) < len(ids):
        raise CheckpointError(f"{source} gives one id to several pieces")


def portable_json(tokenizer: Tokenizer) -> str:
    """Write a tokenizer with its merges as "left right", the one form that tokenizers libraries before 0.20 read too."""
    document = json.loads(tokenizer.to_str())
    merges = document["model"].get("merges", ())
    if not any(" " in part for merge in merges for part in merge):
        document["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(document, ensure_ascii=False, indent=2)


def template_processor(frame: Frame, names: Mapping[int, str]) -> processors.TemplateProcessing:
    """Write a frame as the tokenizers library's post-processor; names are the texts of its special ids."""
    used = {index for slot in frame.single + frame.pair for index in slot.ids}
    return processors.TemplateProcessing(
        single=list(_written(frame.single, names)),
        pair=list(_written(frame.pair, names)),
        special_tokens=[(names[index], index) for index in sorted(used)],
    )


def _written(slots: tuple[Slot, ...], names: Mapping[int, str]) -> Iterator[str]:
    for slot in slots:
        if slot.sequence is None:
            yield from (f"{names[index]}:{slot.type_id}" for index in slot.ids)
        else:
            yield f"${'AB'[slot.sequence]}:{slot.type_id}"


def _merges(sp_model: sentencepiece.SentencePieceProcessor, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    ranked = []
    for piece, index in vocab.items():
        if not (sp_model.is_control(index) or sp_model.is_unknown(index) or sp_model.is_byte(index)):
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab]
            ranked += [(-sp_model.get_score(index), vocab[left], vocab[right], left, right) for left, right in splits]
    return [(left, right) for *_, left, right in sorted(ranked)]
