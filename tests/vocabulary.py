"""Tokenizers and processors for tests: a tiny one trained on the spot, and the real Llama-2 model where the machine has it."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

import pytest
import sentencepiece

from llavakit.processing.chat import TEMPLATES
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.slow import LlamaTokenizer

__all__ = ["IMAGE", "PIECES", "llama2_processor", "llama2_tokenizer", "shared_data", "tiny_processor", "tiny_tokenizer"]

PIECES = 330
IMAGE = PIECES
_SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: what is in the picture? ASSISTANT: a red circle and two blue squares.",
    "The digits are 1 2 3 and 4, the word is: LAMP!",
    "is there a green star left of the yellow triangle? no, it is above.",
)


@functools.cache
def _tiny_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 4),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_tokenizer() -> LlamaTokenizer:
    """Make a tokenizer of PIECES pieces, <image> and <pad> behind them."""
    return LlamaTokenizer(_tiny_model(), added_tokens={"<image>": IMAGE, "<pad>": PIECES + 1}, pad_token="<pad>")


def tiny_processor(template: str = "v1", image_processor: ImageProcessor | None = None) -> LlavaProcessor:
    """Make a processor whose pictures are 28 pixels wide and 16 tokens long."""
    return LlavaProcessor(
        tokenizer=tiny_tokenizer(),
        image_processor=ImageProcessor(size_px=28, crop_px=28, aspect="pad") if image_processor is None else image_processor,
        template=TEMPLATES[template],
        image_token_id=IMAGE,
        patch_size=7,
    )


def shared_data() -> Path:
    """Find the shared data, or skip the test."""
    folder = Path(os.environ.get("LLAVA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set LLAVA_TEST_DATA to run this test")
    return folder


def llama2_tokenizer() -> LlamaTokenizer:
    """Load the real Llama-2 tokenizer with llava-hf's two added tokens, or skip the test."""
    return LlamaTokenizer(shared_data() / "llama2-tokenizer.model", added_tokens={"<image>": 32000, "<pad>": 32001}, pad_token="<pad>")


def llama2_processor(template: str = "v1") -> LlavaProcessor:
    """Make LLaVA-1.5's processor, or skip the test."""
    return LlavaProcessor(
        tokenizer=llama2_tokenizer(),
        image_processor=ImageProcessor(aspect="pad"),
        template=TEMPLATES[template],
        image_token_id=32000,
        patch_size=14,
    )
