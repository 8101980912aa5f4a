"""Configurations of the published models, by name.

Owns: PRESETS and preset(). Nothing is read from a name that is not in the table. Sources: the models' own config.json files; the
vocabulary of llava-hf models is that of their tokenizer with the added tokens, rounded up to a multiple of 64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from llavakit.errors import ConfigError
from llavakit.model.config import LlamaConfig, MistralConfig, Qwen2Config
from llavakit.model.llava_config import LlavaConfig, LlavaNextConfig, published_tower

__all__ = ["PRESETS", "preset"]

_SIGLIP = "google/siglip-so400m-patch14-384"
_LLAMA2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_7B: Mapping[str, Any] = _LLAMA2
_13B: Mapping[str, Any] = {
    **_LLAMA2, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
}  # fmt: skip
_70B: Mapping[str, Any] = {
    **_LLAMA2,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_YI_34B: Mapping[str, Any] = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e6,
    "eos_token_id": 7,
}
_LLAMA3_8B: Mapping[str, Any] = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
_MISTRAL_01: Mapping[str, Any] = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
_MISTRAL_02: Mapping[str, Any] = {**_MISTRAL_01, "sliding_window": None, "rope_theta": 1e6}
_QWEN: Mapping[str, Any] = {"rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151645}
_QWEN_05B: Mapping[str, Any] = {
    **_QWEN, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip
_QWEN_7B: Mapping[str, Any] = {**_QWEN, "intermediate_size": 11008}
_QWEN_72B: Mapping[str, Any] = {
    **_QWEN, "hidden_size": 8192, "intermediate_size": 24576, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 64,
}  # fmt: skip
_QWEN_110B: Mapping[str, Any] = {**_QWEN_72B, "intermediate_size": 49152, "num_key_value_heads": 8}


def _clip(text: LlamaConfig, image_token: int, *, is_next: bool = False) -> LlavaConfig:
    cls = LlavaNextConfig if is_next else LlavaConfig
    return cls(text_config=text, image_token_index=image_token, pad_token_id=image_token + 1)


def _first(text: LlamaConfig) -> LlavaConfig:
    """Describe the first LLaVA: CLIP at 224 pixels, one linear layer, pictures at -200 alone."""
    tower = published_tower("openai/clip-vit-large-patch14")
    return LlavaConfig(text_config=text, vision_config=tower, mm_projector_type="linear", image_token_index=None)


def _interleave(text: LlamaConfig) -> LlavaConfig:
    """Describe an interleave model: SigLIP's last hidden state, every patch of it."""
    tower = published_tower(_SIGLIP)
    tower.num_hidden_layers = 26  # the last layer is not in its files
    return LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=151646,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


PRESETS: Mapping[str, LlamaConfig | LlavaConfig] = {
    "llama-2-7b": LlamaConfig(**_7B),
    "llama-2-13b": LlamaConfig(**_13B),
    "llama-2-70b": LlamaConfig(**_70B),
    "llava-v1-7b": _first(LlamaConfig(**_7B)),
    "llava-v1-13b": _first(LlamaConfig(**_13B)),
    "llava-1.5-7b": _clip(LlamaConfig(**_7B, vocab_size=32064), 32000),
    "llava-1.5-13b": _clip(LlamaConfig(**_13B, vocab_size=32064), 32000),
    "bakllava-v1": _clip(MistralConfig(**_MISTRAL_01, vocab_size=32064), 32000),
    "llava-v1.6-vicuna-7b": _clip(LlamaConfig(**_7B, vocab_size=32064), 32000, is_next=True),
    "llava-v1.6-vicuna-13b": _clip(LlamaConfig(**_13B, vocab_size=32064), 32000, is_next=True),
    "llava-v1.6-mistral-7b": _clip(MistralConfig(**_MISTRAL_02, vocab_size=32064), 32000, is_next=True),
    "llava-v1.6-34b": _clip(LlamaConfig(**_YI_34B, vocab_size=64064), 64000, is_next=True),
    "llama3-llava-next-8b": _clip(LlamaConfig(**_LLAMA3_8B, vocab_size=128320), 128256, is_next=True),
    "llava-next-72b": _clip(Qwen2Config(**_QWEN_72B, vocab_size=152128), 151646, is_next=True),
    "llava-next-110b": _clip(Qwen2Config(**_QWEN_110B, vocab_size=152128), 151646, is_next=True),
    "llava-interleave-qwen-0.5b": _interleave(Qwen2Config(**_QWEN_05B, vocab_size=152000)),
    "llava-interleave-qwen-7b": _interleave(Qwen2Config(**_QWEN_7B, vocab_size=152000)),
}
"""The published sizes; preset() hands out copies."""


def preset(name: str) -> LlamaConfig | LlavaConfig:
    """Return a fresh configuration of a published model. Raises: ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return copy.deepcopy(PRESETS[name])
