"""Tiny random models and checkpoints: the one place where tests make them.

Variants cover grouped and plain heads, tied and untied heads. transformers makes the oracle's twin from the same config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import LlamaConfig as HfLlamaConfig
from transformers import LlamaForCausalLM as HfLlama
from transformers import LlavaConfig as HfLlavaConfig
from transformers import LlavaForConditionalGeneration as HfLlava

from llavakit.model.config import LlamaConfig, LlavaConfig

__all__ = ["VARIANTS", "Variant", "hf_llama", "hf_llava", "llama_config", "llava_config"]

VOCAB = 160
IMAGE_TOKEN = 150
_Model = TypeVar("_Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Variant:
    """One shape of tiny model."""

    name: str
    kv_heads: int
    is_tied: bool
    seed: int


VARIANTS = (Variant("mha", 4, False, 0), Variant("gqa", 2, False, 1), Variant("mqa-tied", 1, True, 2))


def llama_config(variant: Variant = VARIANTS[1]) -> LlamaConfig:
    """Configure a two-layer decoder of width 64."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=variant.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=variant.is_tied,
        rms_norm_eps=1e-5,
    )


def llava_config(variant: Variant = VARIANTS[1]) -> LlavaConfig:
    """Configure a LLaVA with a three-layer tower of width 32 on 28-pixel pictures (16 image tokens)."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    return LlavaConfig(
        text_config=llama_config(variant), vision_config=vision, image_token_index=IMAGE_TOKEN, tie_word_embeddings=variant.is_tied
    )


def hf_llama(variant: Variant = VARIANTS[1]) -> HfLlama:
    """Build the oracle's decoder with random weights of unit scale, so that logits are far from zero."""
    torch.manual_seed(variant.seed)
    model = HfLlama._from_config(HfLlamaConfig(**llama_config(variant).to_dict()), attn_implementation="eager")
    return _scaled(model).eval()


def hf_llava(variant: Variant = VARIANTS[1]) -> HfLlava:
    """Build the oracle's LLaVA with random weights."""
    torch.manual_seed(variant.seed)
    model = HfLlava._from_config(HfLlavaConfig(**llava_config(variant).to_dict()), attn_implementation="eager")
    return _scaled(model).eval()


def _scaled(model: _Model) -> _Model:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5 if weight.shape[0] != VOCAB else 1.0)
    return model
