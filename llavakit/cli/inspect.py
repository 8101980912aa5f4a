"""llava inspect: what a checkpoint holds, read from its headers alone."""

from __future__ import annotations

import json as json_format
import sys
from typing import TYPE_CHECKING, Any

from llavakit.geometry import num_image_tokens
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.processor import LlavaProcessor
from llavakit.storage.folder import read_manifest
from llavakit.storage.hub import resolve_model

if TYPE_CHECKING:
    from llavakit.checkpoint.survey import Survey

__all__ = ["inspect"]


def inspect(
    path: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    vision_tower: str | None = None,
    allow_pickle: bool = False,
    json: bool = False,
) -> None:
    """Show a checkpoint's layout, parts, sizes, dtypes, quantisation, template and preprocessing, and what is odd about it.

    Headers alone are read, no weights.

    Parameters
    ----------
    path
        Folder, GGUF file or hub id.
    revision
        Branch, tag or commit of a hub id.
    base
        Folder or hub id of the model that an adapter belongs to, for what only that can tell.
    vision_tower
        Folder or hub id of an original LLaVA's tower, in place of the one that its config names, or the file of a GGUF file's.
    allow_pickle
        Read the headers of pickle files (.bin, .pth) too.
    json
        Print one JSON object instead of lines.
    """
    from llavakit.checkpoint.parts import Sources
    from llavakit.checkpoint.survey import survey

    folder = resolve_model(path, revision=revision, allow_pickle=allow_pickle)
    found = survey(folder, Sources(base=base, vision_tower=vision_tower, allow_pickle=allow_pickle))
    facts = {"folder": str(folder), **_facts(found), "manifest": "present" if read_manifest(folder) is not None else "absent"}
    if json:
        sys.stdout.write(json_format.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{name:14} {_shown(value)}\n" for name, value in facts.items() if value not in (None, [], {})))


def _facts(found: Survey) -> dict[str, Any]:
    config, processor = found.config, found.processor
    facts: dict[str, Any] = {
        "kind": found.layout if config is None else f"{config.model_type} ({found.layout})",
        "version": found.version,
        "adapter": found.adapter,
        "files": list(found.files),
        "tensors": sum(found.dtypes.values()),
        "parameters": sum(part.num_parameters for part in found.parts),
        "parts": {part.name: part.num_parameters for part in found.parts},
        "bytes": sum(part.num_bytes for part in found.parts),
        "dtypes": dict(found.dtypes),
        "quantisation": found.quantisation,
        "builds on": list(found.builds_on),
    }
    if config is not None:
        text = config.get_text_config()
        facts["decoder"] = (
            f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads over {text.num_kv_heads}, "
            f"vocabulary {text.vocab_size}, context {text.max_position_embeddings}"
        )
    if isinstance(config, LlavaConfig) and isinstance(processor, LlavaProcessor):
        facts |= _vision_facts(config, processor)
    elif processor is not None:
        facts["template"] = processor.template.name
    return {**facts, "oddities": list(found.oddities)}


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


_ASPECTS = {
    "pad": "pads to a square first",
    "crop": "crops the middle square",
    "stretch": "stretches to a square",
    "anyres": "cuts into tiles by size",
}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
