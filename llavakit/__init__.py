"""llavakit: LLaVA in one package. The names below load their modules when they are first used."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "ClipVisionConfig",
    "Conversation",
    "ImagePart",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaModel",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaNextConfig",
    "LlavaProcessor",
    "Message",
    "MistralConfig",
    "Qwen2Config",
    "SamplingParams",
    "SiglipVisionConfig",
    "TextPart",
]


def __getattr__(name: str) -> Any:
    match name:
        case "LLM":
            from llavakit.engine import llm

            return llm.LLM
        case "AsyncEngine":
            from llavakit.engine import service

            return service.AsyncEngine
        case "LlamaForCausalLM" | "LlamaModel" | "LlavaLlamaForCausalLM":
            from llavakit.pretrained import causal_lm

            return getattr(causal_lm, name)
        case "LlamaConfig" | "MistralConfig" | "Qwen2Config":
            from llavakit.model import config

            return getattr(config, name)
        case "ClipVisionConfig" | "SiglipVisionConfig":
            from llavakit.model import vision_config

            return getattr(vision_config, name)
        case "LlavaConfig" | "LlavaNextConfig":
            from llavakit.model import llava_config

            return getattr(llava_config, name)
        case "LlamaTokenizer":
            from llavakit.processing.tokenizer import slow

            return slow.LlamaTokenizer
        case "LlamaTokenizerFast":
            from llavakit.processing.tokenizer import fast

            return fast.LlamaTokenizerFast
        case "LlavaProcessor":
            from llavakit.processing import processor

            return processor.LlavaProcessor
        case "Conversation" | "ImagePart" | "Message" | "SamplingParams" | "TextPart":
            from llavakit import types

            return getattr(types, name)
        case _:
            raise AttributeError(f"module 'llavakit' has no attribute {name!r}")
