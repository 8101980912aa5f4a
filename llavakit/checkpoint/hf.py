"""Writing a checkpoint in the HF layout.

Owns: save_checkpoint (files into a folder) and save_folder (the same, atomically). transformers 4.46+ and 5.x load the result:
tensor names are llava-hf's own, side files come along. Invariant: config.json states the dtype that was written, once for
every version's spelling; what an earlier file said of it, and of a quantisation, is forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llavakit.checkpoint.card import copy_licences
from llavakit.checkpoint.generation import GENERATION_NAME
from llavakit.checkpoint.placement import WEIGHT_KEYS, common_dtype_name
from llavakit.errors import ConfigError
from llavakit.model.config import LlamaConfig
from llavakit.model.decoder import LlamaDecoder, TokenEmbedding
from llavakit.model.linear import QuantizedLinear
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.lora_linear import LoraLinear
from llavakit.storage.documents import read_optional_json, write_json
from llavakit.storage.folder import atomic_folder
from llavakit.storage.tensors import write_tensors

__all__ = ["MAX_SHARD_BYTES", "SideFiles", "parse_size", "save_checkpoint", "save_folder", "write_checkpoint"]

MAX_SHARD_BYTES = 5_000_000_000
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(i?)B")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
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
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    tensors = ((name, weight.detach()) for name, weight in weights.items())
    write_checkpoint(model, folder, dtypes, tensors, processor=processor, source=source, max_shard_bytes=max_shard_bytes)


def write_checkpoint(
    model: _Model,
    folder: Path,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterator[tuple[str, Tensor]],
    *,
    processor: SideFiles | None,
    source: Path | None,
    max_shard_bytes: int,
) -> None:
    """Write a model whose weights come one by one, in the order of its parameters; it may itself lie on the meta device."""
    specs = {name: (dtypes[name], tuple(weight.shape)) for name, weight in model.named_parameters()}
    config = _config(model)
    if changed := [type(module).__name__ for module in model.modules() if isinstance(module, LoraLinear | QuantizedLinear)]:
        raise ConfigError(f"a model with a {changed[0]} is no checkpoint: surgery.merge_lora takes factors in, packed weights stay unsaved")
    if isinstance(config, LlavaConfig) and config.image_token_index is None:
        raise ConfigError("the llava-hf layout needs a row for pictures: add a token, resize the embedding, set config.image_token_index")
    write_json(folder / "config.json", _config_values(config, _architecture(model), [dtype for dtype, _ in specs.values()]))
    given = {} if source is None else read_optional_json(source / GENERATION_NAME)
    write_json(folder / GENERATION_NAME, {**_generation_values(config), **given})
    write_tensors(folder, specs, tensors, max_shard_bytes=max_shard_bytes)
    if processor is not None:
        processor.save_pretrained(folder)
    if source is not None:
        copy_licences(source, folder)


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
    dtype = common_dtype_name(dtypes)
    return {**_without_weight_keys(config.to_dict()), "architectures": [architecture], **dict.fromkeys(_DTYPE_KEYS, dtype)}


def _without_weight_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in WEIGHT_KEYS}
    return {key: _without_weight_keys(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _generation_values(config: LlamaConfig | LlavaConfig) -> dict[str, Any]:
    text = config.text_config if isinstance(config, LlavaConfig) else config
    values = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id, "pad_token_id": config.pad_token_id}
    return {name: value for name, value in values.items() if value is not None}


def parse_size(name: str, size: int | str) -> int:
    """Read a size: bytes, or a whole number with KB, MB, GB, TB (powers of 1000) or KiB ... (of 1024). Raises: ConfigError."""
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match is None:
            raise ConfigError(f'{name} must be bytes or text like "5GB" or "200MiB", got {size!r}')
        num_bytes = int(match[1]) * int((1024 if match[3] else 1000) ** _POWERS[match[2]])
    else:
        num_bytes = size
    if num_bytes < 1:
        raise ConfigError(f"{name} must be at least 1 byte, got {size!r}")
    return num_bytes
