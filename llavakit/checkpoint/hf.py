"""Writing a checkpoint in the HF layout.

Owns: save_checkpoint (files into a folder) and save_folder (the same, atomically). transformers 4.46+ and 5.x load the result:
tensor names are llava-hf's own, side files come along. Invariant: config.json states the dtype that was written, once for
every version's spelling; what an earlier file said of it is forgotten.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llavakit.checkpoint.card import copy_licences
from llavakit.checkpoint.generation import GENERATION_NAME
from llavakit.errors import ConfigError
from llavakit.model.config import LlamaConfig
from llavakit.model.decoder import LlamaDecoder, TokenEmbedding
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.storage.documents import read_optional_json, write_json
from llavakit.storage.folder import atomic_folder
from llavakit.storage.tensors import write_tensors

__all__ = ["MAX_SHARD_BYTES", "SideFiles", "save_checkpoint", "save_folder"]

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_KEYS = ("dtype", "torch_dtype")
_CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
_Model = LlamaCore | LlavaCore | LlamaDecoder


class SideFiles(Protocol):
    """A processor or a tokenizer: what writes its own files into a folder."""

    def save_pretrained(self, folder: str | Path, /) -> object:
        """Write the files."""


def save_folder(
    model: _Model,
    folder: Path,
    *,
    processor: SideFiles | None = None,
    source: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Save into a folder that appears whole or not at all; files of the old folder other than weights and config stay."""
    with atomic_folder(folder, overwrite=True, carry=lambda name: ".safetensors" not in name) as temporary:
        save_checkpoint(model, temporary, processor=processor, source=source, max_shard_bytes=max_shard_bytes)


def save_checkpoint(
    model: _Model,
    folder: Path,
    *,
    processor: SideFiles | None = None,
    source: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, the weights in their dtypes, and the processor's files into a folder.

    The licence files of the folder that the model came from (source) go along, as their terms ask, and so does what its
    generation_config.json says.
    """
    for module in model.modules():
        if isinstance(module, TokenEmbedding) and module.has_pad_row():
            module.settle()
    weights = dict(model.named_parameters())  # a tied head is listed once, under the embedding's name
    specs = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    config = _config(model)
    if isinstance(config, LlavaConfig) and config.image_token_index is None:
        raise ConfigError("the llava-hf layout needs a row for pictures: add a token, resize the embedding, set config.image_token_index")
    write_json(folder / "config.json", _config_values(config, _architecture(model), [dtype for dtype, _ in specs.values()]))
    given = {} if source is None else read_optional_json(source / GENERATION_NAME)
    write_json(folder / GENERATION_NAME, {**_generation_values(config), **given})
    write_tensors(folder, specs, _detached(weights), max_shard_bytes=max_shard_bytes)
    if processor is not None:
        processor.save_pretrained(folder)
    if source is not None and source.is_dir():
        copy_licences(source, folder)


def _detached(weights: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight.detach()) for name, weight in weights.items())


def _config(model: _Model) -> LlamaConfig | LlavaConfig:
    config: object = model.config  # a bare decoder has none of its own, the public class around it has
    assert isinstance(config, LlamaConfig | LlavaConfig)
    return config


def _architecture(model: _Model) -> str:
    """Name the class of transformers that loads the files."""
    kind = _CLASSES[_config(model).model_type]
    match model:
        case LlavaCore():
            return f"{kind}ForConditionalGeneration"
        case LlamaCore():
            return f"{kind}ForCausalLM"
        case LlamaDecoder():
            return f"{kind}Model"


def _config_values(config: LlamaConfig | LlavaConfig, architecture: str, dtypes: list[torch.dtype]) -> dict[str, Any]:
    dtype = str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    return {**_without_dtypes(config.to_dict()), "architectures": [architecture], **dict.fromkeys(_DTYPE_KEYS, dtype)}


def _without_dtypes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _without_dtypes(value) if isinstance(value, Mapping) else value for key, value in values.items() if key not in _DTYPE_KEYS}


def _generation_values(config: LlamaConfig | LlavaConfig) -> dict[str, Any]:
    text = config.text_config if isinstance(config, LlavaConfig) else config
    values = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id, "pad_token_id": config.pad_token_id}
    return {name: value for name, value in values.items() if value is not None}
