"""Writing a checkpoint in the HF layout.

Owns: save_checkpoint (files into a folder) and save_folder (the same, atomically). transformers 4.46+ and 5.x load the result:
tensor names are llava-hf's own, side files come along.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.processing.processor import LlavaProcessor
from llavakit.storage.documents import write_json
from llavakit.storage.folder import atomic_folder
from llavakit.storage.tensors import write_tensors

__all__ = ["MAX_SHARD_BYTES", "save_checkpoint", "save_folder"]

MAX_SHARD_BYTES = 5_000_000_000


def save_folder(
    model: LlamaCore | LlavaCore, folder: Path, *, processor: LlavaProcessor | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Save into a folder that appears whole or not at all; files of the old folder other than weights and config stay."""
    with atomic_folder(folder, overwrite=True, carry=lambda name: ".safetensors" not in name) as temporary:
        save_checkpoint(model, temporary, processor=processor, max_shard_bytes=max_shard_bytes)


def save_checkpoint(
    model: LlamaCore | LlavaCore, folder: Path, *, processor: LlavaProcessor | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json, generation_config.json, the weights in their dtypes, and the processor's files into a folder."""
    weights = dict(model.named_parameters())  # a tied head is listed once, under the embedding's name
    specs = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    text = model.config.text_config if isinstance(model, LlavaCore) else model.config
    write_json(folder / "config.json", _config_values(model, next(iter(weights.values())).dtype))
    write_json(folder / "generation_config.json", _generation_values(text, model.config.pad_token_id))
    write_tensors(folder, specs, _detached(weights), max_shard_bytes=max_shard_bytes)
    if processor is not None:
        processor.save_pretrained(folder)


def _detached(weights: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight.detach()) for name, weight in weights.items())


def _config_values(model: LlamaCore | LlavaCore, dtype: torch.dtype) -> dict[str, Any]:
    architecture = "LlavaForConditionalGeneration" if isinstance(model, LlavaCore) else "LlamaForCausalLM"
    return {"architectures": [architecture], **model.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}


def _generation_values(text: LlamaConfig, pad_token_id: int | None) -> dict[str, Any]:
    values = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id, "pad_token_id": pad_token_id}
    return {name: value for name, value in values.items() if value is not None}
