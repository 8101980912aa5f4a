"""From a checkpoint folder to a model, tensor by tensor.

Owns: load_config, load_core, load_weights (streaming into a model on the meta device), load_processor.
Invariants: problems of names and shapes are found before any weight is read; at any moment memory holds the model so far and
one tensor; NaN and infinite weights are refused, also those that the target dtype makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llavakit.checkpoint.detect import Kind, detect_kind, foreign_kind
from llavakit.checkpoint.layouts import LLAMA, LLAMA_DECODER, LLAVA_HF
from llavakit.checkpoint.rules import Layout, plan_load
from llavakit.errors import CheckpointError, ConfigError
from llavakit.geometry import num_image_tokens
from llavakit.model.config import DECODERS, LlamaConfig
from llavakit.model.decoder import LlamaDecoder
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.chat import ChatTemplate
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.storage.documents import read_json
from llavakit.storage.pickle_tensors import PICKLE
from llavakit.storage.tensors import SAFETENSORS, TensorFolder

__all__ = ["check_finite", "load_config", "load_core", "load_processor", "load_weights"]


def load_config(folder: Path) -> LlamaConfig | LlavaConfig:
    """Read config.json and decide by its content which model it is. Raises: CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        kind = foreign_kind([file.name for file in folder.iterdir()] if folder.is_dir() else [])
        raise CheckpointError(f"{folder} has no config.json" if kind is None else f"{folder} holds {kind}")
    values = read_json(path)
    try:
        if detect_kind(values) is Kind.LLAVA_HF:
            return LlavaConfig.from_dict(values)
        return DECODERS[values["model_type"]].from_dict(values)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_core(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", allow_pickle: bool = False
) -> LlamaCore | LlavaCore:
    """Load the packed core that the folder's config describes, in eval mode; dtype None keeps each tensor's own."""
    config = load_config(folder)
    with torch.device("meta"):
        core = LlavaCore(config) if isinstance(config, LlavaConfig) else LlamaCore(config)
    load_weights(core, folder, dtype=dtype, device=device, allow_pickle=allow_pickle)
    return core.eval()


def load_processor(folder: Path, config: LlamaConfig | LlavaConfig, template: ChatTemplate | None = None) -> LlavaProcessor | TextProcessor:
    """Load the processor of a folder's model. Raises: CheckpointError, also where it makes other pictures than the config's tower takes."""
    if not isinstance(config, LlavaConfig):
        return TextProcessor.from_pretrained(folder, template=template)
    processor, vision = LlavaProcessor.from_pretrained(folder, template=template), config.vision_config
    for name, made, taken in (
        ("pictures of {} pixels", processor.image_processor.crop_px, vision.image_size),
        ("patches of {} pixels", processor.patch_size, vision.patch_size),
        ("{} image tokens for a tile", num_image_tokens(processor.tile_grid), num_image_tokens(config.image_grid)),
        ("image tokens of the id {}", processor.image_token_id, config.image_token_index),
    ):
        if made != taken:
            raise CheckpointError(f"{folder}: the processor's files make {name.format(made)}, config.json takes {name.format(taken)}")
    if (processor.image_processor.aspect == "anyres") != (config.merge is not None):
        raise CheckpointError(f"{folder}: of the processor's files and config.json ({config.model_type}) only one cuts pictures into tiles")
    return processor


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> None:
    """Fill a model whose parameters are on the meta device from a folder's safetensors.

    Pickle files (pytorch_model.bin) are read where there are no safetensors and allow_pickle is set.
    Raises: CheckpointError, before anything is filled where names or shapes are wrong.
    """
    tied = _tied_names(model)
    targets = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    is_pickle = allow_pickle and not SAFETENSORS.is_in(folder) and PICKLE.is_in(folder)
    with TensorFolder(folder, PICKLE if is_pickle else SAFETENSORS) as tensors:
        plan = plan_load(_layout(model), {name: spec.shape for name, spec in tensors.specs.items()}, targets, tied=tied)
        for source in tensors.in_file_order():
            if source in plan and plan[source] not in tied:
                _set(model, plan[source], nn.Parameter(_read(tensors, source, dtype).to(device)))
        _check_tied(model, tensors, {source: tied[target] for source, target in plan.items() if target in tied}, dtype)
    for name, owner in tied.items():
        _set(model, name, model.get_parameter(owner))


def _layout(model: nn.Module) -> Layout:
    match model:
        case LlavaCore():
            return LLAVA_HF
        case LlamaCore():
            return LLAMA
        case LlamaDecoder():
            return LLAMA_DECODER
    raise TypeError(f"no checkpoint layout is known for {type(model).__name__}")


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a shared parameter to its first one."""
    first: dict[int, str] = {}
    tied = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in first:
            tied[name] = first[id(weight)]
        first.setdefault(id(weight), name)
    return tied


def _read(tensors: TensorFolder, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor = tensors.read(name)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is stored as {tensor.dtype}; only floating-point weights are read")
    tensor = tensor.to(tensor.dtype if dtype is None else dtype)
    check_finite(name, tensor)
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that no model can have. Raises: CheckpointError."""
    if not _is_finite(tensor):
        raise CheckpointError(f"tensor {name} holds NaN or infinite values in {tensor.dtype}; the file is damaged, or choose a wider dtype")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. One pass, no copy: a NaN anywhere is both the smallest and the largest value."""
    if tensor.numel() == 0:
        return True
    smallest, largest = torch.aminmax(tensor)
    return math.isfinite(smallest.item()) and math.isfinite(largest.item())


def _check_tied(model: nn.Module, tensors: TensorFolder, owners: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Files may store a shared weight twice; both copies must be the same."""
    for source, owner in owners.items():
        if not torch.equal(_read(tensors, source, dtype).to(model.get_parameter(owner)), model.get_parameter(owner)):
            raise CheckpointError(f"{source} differs from {owner}, but the config ties them; set tie_word_embeddings to false to use both")


def _set(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, weight)
