"""Writing a model as GGUF files that llama.cpp and Ollama run.

Owns: GgufType, gguf_kinds (how each tensor is stored), write_gguf: model-TYPE.gguf, mmproj-TYPE.gguf and a Modelfile.
Refuses: what llama.cpp cannot run: projectors other than two layers with biases, class tokens among the features, rotary scaling other
than linear, tokenizers other than those of sentencepiece, Llama-3 and Qwen2.
Invariant: memory holds one tensor. Norms and biases are float32, as llama.cpp wants them.
Against llama.cpp's known defects with pictures: all layers of the tower are written and clip.vision.feature_layer says which hidden
state is meant (or one layer too few runs), the tower's last norm is left out (or it is applied), vocabulary rows without a token are named
[PADn] (or the sizes differ), the feed-forward block has its first naming (which every version understands).
Sources: conversion of llama.cpp's convert_hf_to_gguf.py, tools/mtmd/clip.cpp, constants.py of the gguf library.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llavakit.checkpoint.card import choose_licence, copy_licences
from llavakit.checkpoint.gguf_settings import OUR_TEMPLATE
from llavakit.checkpoint.gguf_tokens import token_values
from llavakit.checkpoint.layouts import TEXT_PREFIX, gguf_layout, gguf_tower_layout
from llavakit.checkpoint.modelfile import MODELFILE_NAME, modelfile
from llavakit.checkpoint.opening import Processor, tokenizer_of
from llavakit.checkpoint.rotary_order import to_pairs
from llavakit.errors import ConfigError
from llavakit.logs import logger
from llavakit.model.config import LlamaConfig, Qwen2Config
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig, LlavaNextConfig
from llavakit.processing.chat import TEMPLATES, ChatTemplate, Turns
from llavakit.processing.jinja import jinja_text
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.gguf_file import KINDS, GgufKind, gguf_library

__all__ = ["GgufType", "gguf_kinds", "write_gguf"]

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_LOG = logger("checkpoint")
_KINDS = {kind.name.lower(): kind for kind in KINDS.values()}
_F32, _F16, _Q8_0 = _KINDS["f32"], _KINDS["f16"], _KINDS["q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_TOWER_TYPES: Mapping[GgufType, GgufType] = {"f32": "f32", "bf16": "bf16", "f16": "f16", "q8_0": "f16", "q4_0": "f16"}
_DECODER = "model."
_POST_NORM = "vision_tower.vision_model.post_layernorm."
_ASPECTS = {"pad": "pad", "anyres": "anyres", "crop": "square", "stretch": "square"}
_QUANTISATION_VERSION = 2


def gguf_kinds(core: LlamaCore | LlavaCore, type: GgufType) -> dict[str, GgufKind]:
    """Return how each parameter is stored, in the order of writing; what is not in it is left out.

    Rows that cannot be packed are F16, and the head of a q4_0 file is Q8_0. Raises: ConfigError for a model that llama.cpp cannot run.
    """
    _check(core.config)
    kinds = {}
    is_tied = core.text_config.tie_word_embeddings
    for name, weight in core.named_parameters():
        is_text = isinstance(core, LlamaCore) or name.startswith(TEXT_PREFIX)
        kind = _KINDS[type if is_text else _TOWER_TYPES[type]]
        if name.endswith("lm_head.weight") or (is_tied and name.endswith("embed_tokens.weight")):
            kind = _Q8_0 if kind.is_packed else kind
        if weight.dim() == 1 or (weight.dim() == 4 and kind is not _F16):
            kind = _F32
        kind = kind if weight.shape[-1] % kind.block == 0 else _F16
        if not name.startswith(_POST_NORM):
            kinds[name] = kind
    return kinds


def write_gguf(
    core: LlamaCore | LlavaCore,
    folder: Path,
    kinds: Mapping[str, GgufKind],
    tensors: Iterator[tuple[str, Tensor]],
    *,
    processor: Processor,
    source: Path,
    type: GgufType,
) -> None:
    """Write the files of a model whose weights come one by one, in the order of kinds. Raises: ConfigError, CheckpointError."""
    words = tokenizer_of(processor)
    assert isinstance(words, LlamaTokenizer | LlamaTokenizerFast), "load_tokenizer knows no other"
    template = processor.template if isinstance(processor, LlavaProcessor | TextProcessor) else None
    prefix = f"{TEXT_PREFIX}{_DECODER}" if isinstance(core, LlavaCore) else _DECODER
    head = f"{TEXT_PREFIX}lm_head." if isinstance(core, LlavaCore) else "lm_head."
    layout = gguf_layout(core.text_config.num_hidden_layers, prefix, head)
    values = {**_about(source, type), **_text_values(core.text_config), **_token_values(words, template, core.text_config)}
    text = _Output(f"model-{type}.gguf", values, {name: _named(layout.source(name)) for name in kinds if layout.source(name) is not None})
    outputs = [text]
    if isinstance(core, LlavaCore):
        assert isinstance(processor, LlavaProcessor)
        tower_type = _TOWER_TYPES[type]
        vision = gguf_tower_layout(core.config.vision_config.num_hidden_layers, core.config.projector_depth, is_swapped=True)
        values = {**_about(source, tower_type), **_tower_values(core.config, processor)}
        names = {name: _named(vision.source(name)) for name in kinds if name not in text.names}
        outputs.append(_Output(f"mmproj-{tower_type}.gguf", values, names))
    rotary = None if isinstance(core.text_config, Qwen2Config) else core.text_config.head_width
    shapes = {name: tuple(weight.shape) for name, weight in core.named_parameters()}
    with contextlib.ExitStack() as files:
        places = _open_files(files, folder, outputs, kinds, shapes)
        for name, tensor in tensors:
            places[name].write_tensor_data(_packed(_ordered(name, tensor, rotary), kinds[name]))
    (folder / MODELFILE_NAME).write_text(modelfile([output.file for output in outputs], template, words), encoding="utf-8")
    copy_licences(source, folder)


@dataclass(frozen=True, slots=True)
class _Output:
    """One file to write."""

    file: str
    metadata: Mapping[str, Any]
    names: Mapping[str, str]
    """Names in the file by ours."""


def _open_files(
    files: contextlib.ExitStack, folder: Path, outputs: list[_Output], kinds: Mapping[str, GgufKind], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Write the headers, and return the writer of each tensor."""
    gguf = gguf_library()
    places: dict[str, Any] = {}
    for output in outputs:
        writer = gguf.GGUFWriter(folder / output.file, output.metadata["general.architecture"])
        files.callback(writer.close)
        places |= dict.fromkeys(output.names, writer)
        for key, value in output.metadata.items():
            _put(writer, key, value)
        for name, shown in output.names.items():
            shape, kind = shapes[name], kinds[name]
            num_bytes = math.prod(shape) // kind.block * kind.block_bytes
            writer.add_tensor_info(shown, shape, np.dtype(np.float32), num_bytes, gguf.GGMLQuantizationType(kind.index))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    return places


def _packed(tensor: Tensor, kind: GgufKind) -> Any:
    """Return the bytes of a tensor, which has the kind's dtype already, or is float32 to be packed."""
    if kind.is_packed:
        return gguf_library().quants.quantize(tensor.numpy(), gguf_library().GGMLQuantizationType(kind.index))
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _put(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str() if key == "general.architecture":
            pass  # the writer has put it down
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _ordered(name: str, tensor: Tensor, head_width: int | None) -> Tensor:
    is_rotary = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
    if head_width is None or not is_rotary or name.startswith("vision_tower."):
        return tensor
    return to_pairs(tensor, head_width)


def _named(name: str | None) -> str:
    assert name is not None, "the layouts name every tensor of ours"
    return name


def _check(config: LlamaConfig | LlavaConfig) -> None:
    """Refuse what llama.cpp does not run. Raises: ConfigError."""
    text = config.get_text_config()
    if text.rope_scaling is not None and text.rope_scaling.get("type") != "linear":
        raise ConfigError(f"GGUF files hold linear rotary scaling only, not {text.rope_scaling}")
    if text.window is not None:
        _LOG.warning("llama.cpp runs this model without its window of %d positions", text.window)
    if not isinstance(config, LlavaConfig):
        return
    if config.mm_projector_type != "mlp2x_gelu" or not config.multimodal_projector_bias:
        raise ConfigError(f"llama.cpp runs projectors of two layers with biases, not {config.mm_projector_type}; use --to hf")
    acts = ("quick_gelu", "gelu") if config.vision_config.has_cls else ("gelu_pytorch_tanh",)
    if config.vision_config.hidden_act not in acts:
        raise ConfigError(f"llama.cpp runs such towers with {' or '.join(acts)}, not {config.vision_config.hidden_act}")
    if config.vision_config.has_cls and config.vision_feature_select_strategy == "full":
        raise ConfigError("llama.cpp drops the tower's class token, which this model keeps as a feature")
    if list(config.feature_depths) != sorted(set(config.feature_depths)):
        raise ConfigError(f"llama.cpp puts hidden states side by side in their order, not as {config.vision_feature_layer}")


def _about(source: Path, type: GgufType) -> dict[str, Any]:
    licence = choose_licence(None, source)
    stated = {
        "general.license": licence.license, "general.license.name": licence.license_name, "general.license.link": licence.license_link,
    }  # fmt: skip
    return {
        "general.file_type": _FILE_TYPES[type],
        "general.quantization_version": _QUANTISATION_VERSION,
        **{key: value for key, value in stated.items() if value is not None},
    }


def _text_values(config: LlamaConfig) -> dict[str, Any]:
    name = "qwen2" if isinstance(config, Qwen2Config) else "llama"
    scaling = config.rope_scaling
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.head_width,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        **({} if scaling is None else {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}),
    }
    return {
        "general.architecture": name,
        "general.type": "model",
        "general.name": config.model_type,
        **{f"{name}.{key}": value for key, value in values.items()},
    }


def _token_values(words: LlamaTokenizer | LlamaTokenizerFast, template: ChatTemplate | None, config: LlamaConfig) -> dict[str, Any]:
    """Describe tokenizer and template. Raises: ConfigError."""
    has_bos = (words.add_bos_token if template is None else template.has_bos) and words.bos_token_id is not None
    others = [index for index in config.end_ids() if index != words.eos_token_id]
    chat = None if template is None or not isinstance(template.form, Turns) else jinja_text(template)
    return {
        **token_values(words, config.vocab_size),
        "tokenizer.ggml.add_bos_token": has_bos,
        "tokenizer.ggml.add_eos_token": words.add_eos_token,
        **({"tokenizer.ggml.eot_token_id": others[0]} if others else {}),
        **({} if chat is None else {"tokenizer.chat_template": chat}),
        **({} if template is None or template.name not in TEMPLATES else {OUR_TEMPLATE: template.name}),
    }


def _tower_values(config: LlavaConfig, processor: LlavaProcessor) -> dict[str, Any]:
    vision, images = config.vision_config, processor.image_processor
    is_padded = images.aspect == "crop" and processor.preprocessing_note is not None
    values = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": config.text_config.hidden_size,
        "block_count": vision.num_hidden_layers,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": vision.layer_norm_eps,
        "feature_layer": list(config.feature_depths),
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        "image_aspect_ratio": "pad" if is_padded else _ASPECTS[images.aspect],
    }
    if isinstance(config, LlavaNextConfig):
        values["image_grid_pinpoints"] = [side for height, width in config.image_grid_pinpoints for side in (width, height)]
        values["mm_patch_merge_type"] = config.mm_patch_merge_type
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": config.model_type,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.hidden_act != "quick_gelu",
        **{f"clip.vision.{key}": value for key, value in values.items()},
    }
