"""Tiny models as GGUF files, written by the gguf library's own writer with names and orders of the tests' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llavakit.checkpoint.hf import save_folder
from llavakit.model.config import LlamaConfig
from llavakit.model.llava_config import LlavaConfig, LlavaNextConfig
from llavakit.pretrained.causal_lm import LlavaLlamaForCausalLM
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.tiny import IMAGE_TOKEN, SIDE, tiny_processor, tiny_tokenizer

__all__ = ["IDS", "PICTURE", "logits_of", "save_hf", "split_weights", "write_both", "write_text", "write_tower"]

IDS = torch.tensor([[1, 5, 6, IMAGE_TOKEN, 7, 8]])
PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 70, 30))
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TOWER_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1", "layer_norm2": "ln2",
}  # fmt: skip
_EMBEDDINGS = {"class_embedding": "v.class_embd", "patch_embedding.weight": "v.patch_embd.weight"}


def split_weights(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the language model's weights, without LLaVA's prefix, and the others."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    text = {name.removeprefix("language_model."): weight for name, weight in weights.items() if name.startswith("language_model.")}
    return text, {name: weight for name, weight in weights.items() if not name.startswith("language_model.")}


def write_both(
    folder: Path, model: LlavaLlamaForCausalLM, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32, **how: Any
) -> Path:
    """Write a LLaVA as two files whose names say nothing."""
    text, tower = split_weights(model)
    write_text(folder / "first.gguf", model.config.text_config, text, kind)
    write_tower(folder / "second.gguf", model.config, tower, kind, **how)
    return folder


def save_hf(folder: Path, model: LlavaLlamaForCausalLM, processor: LlavaProcessor | None = None) -> Path:
    """Save in the Hugging Face layout."""
    save_folder(model, folder, processor=tiny_processor() if processor is None else processor)
    return folder


def logits_of(model: Any) -> Tensor:
    """Run a prompt with a picture of noise."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    result: Tensor = model(IDS, pixel_values=pixels).logits
    return result


def write_text(
    path: Path,
    config: LlamaConfig,
    weights: dict[str, Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    tokenizer: LlamaTokenizer | LlamaTokenizerFast | None = None,
    num_splits: int = 1,
    values: dict[str, Any] | None = None,
) -> Path:
    """Write a language model; weights have our names without LLaVA's prefix. values replace metadata, or add to it; None takes out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=0 if num_splits == 1 else -(-len(weights) // num_splits))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if isinstance(tokenizer, LlamaTokenizerFast):
        _add_byte_level(writer, tokenizer, config.vocab_size)
    else:
        _add_tokens(writer, tiny_tokenizer() if tokenizer is None else tokenizer, config.vocab_size)
    _change(writer, values or {})
    for name, weight in weights.items():
        array = weight.detach().float().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            num_heads = config.num_attention_heads if ".q_proj." in name else config.num_kv_heads
            array = _interleaved(array, num_heads)
        _add(writer, _text_name(name), array, kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32)
    _finish(writer)
    return path


def write_tower(
    path: Path,
    config: LlavaConfig,
    weights: dict[str, Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    is_legacy: bool = True,
    has_last_layer: bool = False,
    values: dict[str, Any] | None = None,
) -> Path:
    """Write tower and projector as llama.cpp's first converter did, or with its later names and keys; values as in write_text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vision, depth = config.vision_config, max(config.feature_depths)
    num_layers = vision.num_hidden_layers if has_last_layer else depth
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    if is_legacy and not has_last_layer:
        writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)
    numbers = {
        "image_size": vision.image_size, "patch_size": vision.patch_size, "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size, "projection_dim": 768, "attention.head_count": vision.num_attention_heads,
        "block_count": num_layers,
    }  # fmt: skip
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    if not is_legacy:
        writer.add_array("clip.vision.feature_layer", [depth])
    if isinstance(config, LlavaNextConfig):
        writer.add_array(
            "clip.vision.image_grid_pinpoints", [side for height, width in config.image_grid_pinpoints for side in (width, height)]
        )
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
    _change(writer, values or {})
    for name, weight in weights.items():
        shown = _tower_name(name, is_legacy=is_legacy, num_layers=num_layers)
        if shown is not None:
            array = weight.detach().float().numpy()
            _add(writer, shown, array, kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32)
    _finish(writer)
    return path


def _change(writer: gguf.GGUFWriter, values: dict[str, Any]) -> None:
    add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        if value is None:
            del writer.kv_data[0][key]
        else:
            add.get(type(value), writer.add_array)(key, value)


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: LlamaTokenizer, num_rows: int) -> None:
    pieces, added = tokenizer.sp_model, tokenizer.added_tokens_decoder
    tokens, scores, types = [], [], []
    for index in range(num_rows):
        if index < pieces.vocab_size():
            checks = {2: pieces.is_unknown, 3: pieces.is_control, 5: pieces.is_unused, 6: pieces.is_byte}
            kind = next((number for number, check in checks.items() if check(index)), 1)
            entry = pieces.id_to_piece(index), pieces.get_score(index), kind
        else:
            entry = (str(added[index].content), -1000.0, 3) if index in added else (f"[PAD{index}]", -10000.0, 5)
        tokens.append(entry[0])
        scores.append(entry[1])
        types.append(entry[2])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


def _add_byte_level(writer: gguf.GGUFWriter, tokenizer: LlamaTokenizerFast, num_rows: int) -> None:
    document = json.loads(tokenizer.files()["tokenizer.json"])
    entries = {index: (text, 1) for text, index in document["model"]["vocab"].items()}
    entries |= {entry["id"]: (entry["content"], 3 if entry["special"] else 4) for entry in document["added_tokens"]}
    rows = [entries.get(index, (f"[PAD{index}]", 5)) for index in range(num_rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges(document["model"]["merges"])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    for name, index in ids.items():
        if index is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(tokenizer.add_bos_token)


def _interleaved(array: Any, num_heads: int) -> Any:
    width = array.shape[0] // num_heads
    return array.reshape(num_heads, 2, width // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _text_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    _, _, number, module = stem.split(".", 3)
    return f"blk.{number}.{_LAYER[module]}.{leaf}"


def _tower_name(name: str, *, is_legacy: bool, num_layers: int) -> str | None:
    if name == "image_newline":
        return "model.image_newline" if is_legacy else "v.image_newline"
    if name.startswith("mm."):
        return name
    if name.startswith("multi_modal_projector."):
        return name.replace("multi_modal_projector.linear_1", "mm.0").replace("multi_modal_projector.linear_2", "mm.2")
    name = name.removeprefix("vision_tower.vision_model.")
    if name.startswith("embeddings."):
        return _EMBEDDINGS.get(name.removeprefix("embeddings."), "v.position_embd.weight")
    if name.startswith("head."):
        return f"v.{name}"
    if name.startswith("pre_layrnorm."):
        return name.replace("pre_layrnorm", "v.pre_ln")
    if name.startswith("post_layernorm."):
        return None
    _, _, number, module = name.split(".", 3)
    module, _, leaf = module.rpartition(".")
    fc1, fc2 = ("ffn_down", "ffn_up") if is_legacy else ("ffn_up", "ffn_down")
    shown = {**_TOWER_LAYER, "mlp.fc1": fc1, "mlp.fc2": fc2}[module]
    return f"v.blk.{number}.{shown}.{leaf}" if int(number) < num_layers else None


def _add(writer: gguf.GGUFWriter, name: str, array: Any, kind: gguf.GGMLQuantizationType) -> None:
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, array)
    elif array.ndim == 4 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        writer.add_tensor(name, array.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
