"""llava inspect: what a checkpoint holds, read from its headers alone."""

from __future__ import annotations

import json as json_format
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoint.detect import Kind, kind_of_config
from llavakit.checkpoint.gguf_read import is_gguf, open_gguf
from llavakit.checkpoint.load import load_config, load_processor
from llavakit.checkpoint.packed import dense_tensors, weight_format
from llavakit.geometry import num_image_tokens
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.load import has_tokenizer
from llavakit.storage.documents import read_json
from llavakit.storage.folder import read_manifest
from llavakit.storage.hub import resolve_model
from llavakit.storage.tensors import TensorFolder, TensorSpec

__all__ = ["inspect"]


def inspect(path: str, *, revision: str | None = None, json: bool = False) -> None:
    """Show a checkpoint's kind, size, dtypes, template and preprocessing without loading its weights.

    Parameters
    ----------
    path
        Folder, GGUF file or hub id.
    revision
        Branch, tag or commit of a hub id.
    json
        Print one JSON object instead of lines.
    """
    folder = resolve_model(path, revision=revision)
    config = load_config(folder)
    specs, dtypes, dense = _gguf_tensors(folder) if is_gguf(folder) else _tensors(folder)
    parts: Counter[str] = Counter()
    for name, spec in dense.items():
        parts[_part(name)] += math.prod(spec.shape)
    facts: dict[str, Any] = {
        "folder": str(folder),
        "kind": f"{config.model_type} ({'GGUF' if is_gguf(folder) else _LAYOUTS[kind_of_config(read_json(folder / 'config.json'))]})",
        "tensors": len(specs),
        "parameters": sum(parts.values()),
        "parts": dict(parts),
        "bytes": sum(spec.num_bytes for spec in specs.values()),
        "dtypes": dict(Counter(dtypes)),
        "manifest": "present" if read_manifest(folder) is not None else "absent",
    }
    text = config.text_config if isinstance(config, LlavaConfig) else config
    facts["decoder"] = (
        f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads over {text.num_kv_heads}, "
        f"vocabulary {text.vocab_size}, context {text.max_position_embeddings}"
    )
    if isinstance(config, LlavaConfig) or is_gguf(folder) or has_tokenizer(folder):
        processor = load_processor(folder, config)
        if isinstance(config, LlavaConfig) and isinstance(processor, LlavaProcessor):
            facts |= _vision_facts(config, processor)
        else:
            facts["template"] = processor.template.name
    if json:
        sys.stdout.write(json_format.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{name:14} {_shown(value)}\n" for name, value in facts.items()))


def _tensors(folder: Path) -> tuple[Mapping[str, TensorSpec], list[str], Mapping[str, TensorSpec]]:
    with TensorFolder(folder, weight_format(folder)) as tensors:
        dtypes = [str(spec.dtype).removeprefix("torch.") for spec in tensors.specs.values()]
        return tensors.specs, dtypes, dense_tensors(tensors, folder).specs


def _gguf_tensors(path: Path) -> tuple[Mapping[str, TensorSpec], list[str], Mapping[str, TensorSpec]]:
    with open_gguf(path) as model:
        files = [*model.texts, *(() if model.tower is None else (model.tower,))]
        kinds = [kind.name for file in files for kind in file.kinds.values()]
        specs = {name: spec for file in files for name, spec in file.specs.items()}
        return specs, kinds, specs


def _vision_facts(config: LlavaConfig, processor: LlavaProcessor) -> dict[str, Any]:
    vision = config.vision_config
    aspect = _ASPECTS[processor.image_processor.aspect]
    system = processor.template.system
    return {
        "tower": (
            f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, {max(config.feature_depths)} run; "
            f"{vision.image_size} px, {num_image_tokens(config.image_grid)} tokens per {'picture' if config.merge is None else 'tile'}"
        ),
        "projector": config.mm_projector_type,
        "preprocessing": aspect if processor.preprocessing_note is None else f"{aspect}; {processor.preprocessing_note}",
        "template": f"{processor.template.name} ({'no system line' if system is None else 'with system line'})",
    }


_LAYOUTS = {Kind.LLAVA_HF: "llava-hf layout", Kind.ORIGINAL: "original LLaVA's layout", Kind.DECODER: "Llama"}
_ASPECTS = {
    "pad": "pads to a square first",
    "crop": "crops the middle square",
    "stretch": "stretches to a square",
    "anyres": "cuts into tiles by size",
}


def _part(name: str) -> str:
    for part, begins in (("vision_tower", "v."), ("multi_modal_projector", "mm.")):
        if part in name or name.startswith(begins):
            return part
    return "language_model"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
