"""Tiny random models and checkpoints: the one place where tests make them.

Variants cover plain, grouped and single key-value heads, tied and untied heads. Weights have unit scale (not 0.02), so that
logits are far from zero and a mistake in any part shows. transformers makes the oracle's twin from the same config; it is
imported only where an oracle is asked for.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llavakit.checkpoint.hf import save_folder
from llavakit.checkpoint.layouts import LLAMA, LLAVA_HF
from llavakit.checkpoint.rules import Layout
from llavakit.model.config import LlamaConfig, MistralConfig, Qwen2Config
from llavakit.model.llava_config import DEFAULT_PINPOINTS, LlavaConfig, LlavaNextConfig
from llavakit.model.vision_config import ClipVisionConfig, SiglipVisionConfig
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlavaLlamaForCausalLM
from llavakit.processing.chat import TEMPLATES
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.reproduce.vocabulary import train_tokenizer
from llavakit.world.scenes import draw_scene
from llavakit.world.truth import captions, scene_truth

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM as HfLlama
    from transformers import LlavaForConditionalGeneration as HfLlava

__all__ = [
    "DECODER_KINDS",
    "FAMILIES",
    "IMAGE_TOKEN",
    "NUM_IMAGE_TOKENS",
    "NUM_PIECES",
    "PAD_TOKEN",
    "SIDE",
    "VARIANTS",
    "VOCAB",
    "Variant",
    "copy_weights",
    "decoder_config",
    "family_config",
    "hf_decoder",
    "hf_family",
    "hf_llama",
    "hf_llava",
    "llama",
    "llama3_tokenizer_folder",
    "llama_config",
    "llava",
    "llava_config",
    "qwen_tokenizer_folder",
    "save_llava",
    "scale_weights",
    "tiny_processor",
    "tiny_tokenizer",
]

NUM_PIECES = 352
"""Pieces of the tiny tokenizer."""
IMAGE_TOKEN, PAD_TOKEN = NUM_PIECES, NUM_PIECES + 1
VOCAB = 384
SIDE, PATCH = 28, 7
NUM_IMAGE_TOKENS = (SIDE // PATCH) ** 2
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
    vision = ClipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
    )
    return LlavaConfig(
        text_config=llama_config(variant), vision_config=vision, image_token_index=IMAGE_TOKEN, tie_word_embeddings=variant.is_tied
    )


DECODER_KINDS: dict[str, tuple[type[LlamaConfig], dict[str, Any]]] = {
    "rope-linear": (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "rope-dynamic": (LlamaConfig, {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}),
    "rope-llama3": (
        LlamaConfig,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "wide-heads": (LlamaConfig, {"head_dim": 24}),
    "mistral": (MistralConfig, {"sliding_window": None, "rope_theta": 1e6}),
    "mistral-window": (MistralConfig, {"sliding_window": 9}),
    "qwen2": (Qwen2Config, {"rope_theta": 1e6}),
}
"""Decoders beside plain Llama, by what is special about them."""
FAMILIES: dict[str, tuple[str, str, bool]] = {
    "1.5": ("llama", "clip", False),
    "bakllava": ("mistral", "clip", False),
    "interleave": ("qwen2", "siglip", False),
    "1.6-vicuna": ("llama", "clip", True),
    "1.6-mistral": ("mistral", "clip", True),
    "1.6-llama3": ("rope-llama3", "clip", True),
    "1.6-qwen": ("qwen2", "clip", True),
    "1.6-siglip": ("llama", "siglip", True),
}
"""The family: decoder, tower, and whether pictures are cut by their size."""


def decoder_config(kind: str) -> LlamaConfig:
    """Configure a two-layer decoder of a kind of DECODER_KINDS, or plain llama."""
    cls, special = DECODER_KINDS.get(kind, (LlamaConfig, {}))
    shape = {name: value for name, value in llama_config().to_dict().items() if name not in ("model_type", "rope_parameters")}
    return cls(**{**shape, "bos_token_id": 1, "eos_token_id": 2, **special})


def family_config(name: str) -> LlavaConfig:
    """Configure a tiny member of the family."""
    decoder, tower, is_next = FAMILIES[name]
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"image_size": SIDE, "patch_size": PATCH}
    parts: dict[str, Any] = {
        "text_config": decoder_config(decoder),
        "vision_config": ClipVisionConfig(**shape) if tower == "clip" else SiglipVisionConfig(**shape),
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "vision_feature_layer": -2 if tower == "clip" else -1,
    }
    if not is_next:
        return LlavaConfig(**parts)
    pinpoints = [[height * SIDE // 336, width * SIDE // 336] for height, width in DEFAULT_PINPOINTS]
    return LlavaNextConfig(**parts, image_grid_pinpoints=pinpoints)


def hf_decoder(config: LlamaConfig, seed: int = 0) -> Any:
    """Build the oracle of a decoder's config with random weights of unit scale."""
    import transformers

    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[config.model_type]
    theirs = getattr(transformers, f"{kind}Config")(**config.to_dict())
    return scale_weights(getattr(transformers, f"{kind}ForCausalLM")._from_config(theirs, attn_implementation="eager"), seed).eval()


def hf_family(config: LlavaConfig, seed: int = 0) -> Any:
    """Build the oracle of a LLaVA's config with random weights of unit scale."""
    import transformers

    kind = "LlavaNext" if isinstance(config, LlavaNextConfig) else "Llava"
    theirs = getattr(transformers, f"{kind}Config")(**config.to_dict())
    oracle = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(theirs, attn_implementation="eager")
    return scale_weights(oracle, seed).eval()


def llama(variant: Variant = VARIANTS[1]) -> LlamaForCausalLM:
    """Build our language model with random weights of unit scale."""
    return scale_weights(LlamaForCausalLM(llama_config(variant)), variant.seed).eval()


def llava(variant: Variant = VARIANTS[1]) -> LlavaLlamaForCausalLM:
    """Build our LLaVA with random weights of unit scale."""
    return scale_weights(LlavaLlamaForCausalLM(llava_config(variant)), variant.seed).eval()


def hf_llama(variant: Variant = VARIANTS[1]) -> HfLlama:
    """Build the oracle's language model with random weights of unit scale."""
    from transformers import LlamaConfig as HfLlamaConfig
    from transformers import LlamaForCausalLM as HfLlama

    config = HfLlamaConfig(**llama_config(variant).to_dict())
    return scale_weights(HfLlama._from_config(config, attn_implementation="eager"), variant.seed).eval()


def hf_llava(variant: Variant = VARIANTS[1]) -> HfLlava:
    """Build the oracle's LLaVA with random weights of unit scale."""
    from transformers import LlavaConfig as HfLlavaConfig
    from transformers import LlavaForConditionalGeneration as HfLlava

    config = HfLlavaConfig(**llava_config(variant).to_dict())
    return scale_weights(HfLlava._from_config(config, attn_implementation="eager"), variant.seed).eval()


def copy_weights(oracle: torch.nn.Module, ours: _Model, layout: Layout | None = None) -> _Model:
    """Give our model the oracle's weights, renamed as a checkpoint's would be; layout None chooses by the model's class."""
    if layout is None:
        layout = LLAVA_HF if isinstance(ours, LlavaLlamaForCausalLM) else LLAMA
    kept = {name: weight for name, weight in oracle.state_dict().items() if layout.drop_reason(name) is None}
    ours.load_state_dict({layout.target(name) or name: weight for name, weight in kept.items()})
    return ours


def scale_weights(model: _Model, seed: int = 0) -> _Model:
    """Draw matrices anew with unit scale: embeddings with variance 1, products that keep the variance; biases and vectors a third."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 1.0 if weight.shape[0] == VOCAB else weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith((".bias", "image_newline", "class_embedding")):
                weight.normal_(0.0, 0.3, generator=generator)
    return model


def tiny_tokenizer() -> LlamaTokenizer:
    """Build the tiny models' tokenizer, trained on the miniature's world, with <image> and <pad> behind its pieces."""
    return LlamaTokenizer(_tokenizer_model(), added_tokens={"<image>": IMAGE_TOKEN, "<pad>": PAD_TOKEN}, pad_token="<pad>")


def tiny_processor(template: str = "v1", image_processor: ImageProcessor | None = None) -> LlavaProcessor:
    """Build the tiny models' processor, for pictures of 28 pixels and 16 tokens."""
    return LlavaProcessor(
        tokenizer=tiny_tokenizer(),
        image_processor=ImageProcessor(size_px=SIDE, crop_px=SIDE, aspect="pad") if image_processor is None else image_processor,
        template=TEMPLATES[template],
        image_token_id=IMAGE_TOKEN,
        patch_size=PATCH,
    )


def save_llava(folder: Path, variant: Variant = VARIANTS[1]) -> Path:
    """Save a tiny LLaVA with its processor, a complete checkpoint; returns the folder."""
    save_folder(llava(variant), folder, processor=tiny_processor())
    return folder


def llama3_tokenizer_folder(path: Path) -> Path:
    """Write a Llama-3-like byte-level tokenizer: bos by template, whole words taken without merges, <image> and <pad>."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>")
    tokenizer = _train_byte_level(words, specials, ())
    document = json.loads(tokenizer.to_str())
    document["model"]["ignore_merges"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    bos, bos_id = specials[0], tokenizer.token_to_id(specials[0])
    template = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|eot_id|>", "pad_token": "<pad>"}
    return _write_tokenizer(path, tokenizer, {**config, "clean_up_tokenization_spaces": True, "model_max_length": 8192})


def qwen_tokenizer_folder(path: Path) -> Path:
    """Write a Qwen-like byte-level tokenizer: no bos, NFC, digits one by one, <image>, and <tool_call>, which is text."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    tokenizer = _train_byte_level(words, specials, ("<tool_call>", "</tool_call>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    roles = {"bos_token": None, "unk_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "Qwen2Tokenizer", **roles, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return _write_tokenizer(path, tokenizer, {**config, "add_prefix_space": False, "split_special_tokens": False})


def _train_byte_level(words: str, specials: tuple[str, ...], plain: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    lines = [line for _ in range(20) for line in captions(scene_truth(draw_scene(rng)), rng)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=NUM_PIECES, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return tokenizer


def _write_tokenizer(path: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(index): {"content": token.content, **{flag: getattr(token, flag) for flag in flags}}
        for index, token in tokenizer.get_added_tokens_decoder().items()
    }
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}), "utf-8")
    return path


@functools.cache
def _tokenizer_model() -> bytes:
    system = TEMPLATES["v1"].system
    assert system is not None
    return train_tokenizer(NUM_PIECES, system, seed=0, num_scenes=20)
