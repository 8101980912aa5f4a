"""tokenizer.json for a Llama sentencepiece model, so that the tokenizers library gives sentencepiece's ids.

Owns: recovering BPE merges from the scores of the pieces. Merges are ranked by the score of what they make, not by its id:
Llama's all-space pieces have early ids and the lowest scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from llavakit.errors import CheckpointError

__all__ = ["tokenizer_json"]


def tokenizer_json(
    sp_model: sentencepiece.SentencePieceProcessor, added_tokens: Mapping[str, int], *, add_bos: bool = True, add_eos: bool = False
) -> str:
    """Build the text of tokenizer.json in the form that Llama-2's has: prepend, byte fallback, bos and eos by template.

    Raises: CheckpointError when the added tokens' ids leave gaps, which this file cannot express.
    """
    pieces = [sp_model.id_to_piece(index) for index in range(sp_model.vocab_size())]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    unk, bos, eos = (pieces[index] for index in (sp_model.unk_id(), sp_model.bos_id(), sp_model.eos_id()))
    model = models.BPE(vocab=vocab, merges=_merges(sp_model, vocab), unk_token=unk, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    head, tail = ([f"{bos}:%d"] if add_bos else []), ([f"{eos}:%d"] if add_eos else [])
    single, second = (" ".join((*head, f"{name}:%d", *tail)).replace("%d", kind) for name, kind in (("$A", "0"), ("$B", "1")))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} {second}", special_tokens=[(bos, sp_model.bos_id()), (eos, sp_model.eos_id())]
    )
    ordered = sorted(added_tokens.items(), key=lambda item: item[1])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (unk, bos, eos, *(token for token, _ in ordered))])
    for token, index in ordered:
        if tokenizer.token_to_id(token) != index:
            raise CheckpointError(f"added token {token!r} has id {index}; added tokens must follow the {len(pieces)} pieces without a gap")
    return str(tokenizer.to_str(pretty=True))


def _merges(sp_model: sentencepiece.SentencePieceProcessor, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    ranked = []
    for piece, index in vocab.items():
        if not (sp_model.is_control(index) or sp_model.is_unknown(index) or sp_model.is_byte(index)):
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab]
            ranked += [(-sp_model.get_score(index), vocab[left], vocab[right], left, right) for left, right in splits]
    return [(left, right) for *_, left, right in sorted(ranked)]
