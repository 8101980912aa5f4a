"""The miniature's tokenizer: a sentencepiece BPE model with Llama's settings, trained on the world's own text.

Owns: the corpus and the trainer's options (byte fallback, digits one by one, dummy prefix, no normalisation: as Llama-2's).
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import sentencepiece

from llavakit.reproduce.teacher import small_talk, text_instruction
from llavakit.world.scenes import LETTERS, WORDS, draw_scene
from llavakit.world.truth import captions, scene_truth

__all__ = ["train_tokenizer"]


def train_tokenizer(vocab_size: int, system: str, seed: int, *, num_scenes: int = 6000) -> bytes:
    """Train and return the serialized sentencepiece model; the same arguments give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(system, seed, num_scenes),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_surface=" \u2047 ",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _corpus(system: str, seed: int, num_scenes: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(num_scenes):
        truth = scene_truth(draw_scene(rng))
        yield system
        yield from captions(truth, rng)
        for conversation in (text_instruction(truth, rng, 6), small_talk(rng, truth)):
            for message in conversation.messages:
                yield f"{'USER' if message.role == 'user' else 'ASSISTANT'}: {message.text}"
        yield " ".join((*LETTERS, *rng.sample(WORDS, 4)))
