"""Real data for tests where the machine has it: the Llama-2 tokenizer, photographs; tests skip, saying so, where it has not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llavakit.processing.chat import TEMPLATES
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.slow import LlamaTokenizer

__all__ = ["llama2_processor", "llama2_tokenizer", "shared_data"]


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
