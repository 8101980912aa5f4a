"""From a checkpoint folder to a model, tensor by tensor.

Owns: load_config (detection by content), load_weights (streaming into a model on the meta device).
Invariants: problems of names and shapes are found before any weight is read; at any moment memory holds the model so far and
one tensor; NaN and infinite weights are refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from llavakit.checkpoint.layouts import LLAMA, LLAVA_HF
from llavakit.checkpoint.rules import plan_load
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.config import LlamaConfig, LlavaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.storage.documents import read_json
from llavakit.storage.tensors import TensorFolder

__all__ = ["load_config", "load_core", "load_weights"]

_FINITE_CHUNK = 1 << 24


def load_config(folder: Path) -> LlamaConfig | LlavaConfig:
    """Read config.json and decide by its content which model it is. Raises: CheckpointError, ConfigError."""
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    try:
        if kind == "llava" and "text_config" in values:
            return LlavaConfig.from_dict(values)
        if kind == "llama":
            return LlamaConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    if kind == "llava":
        raise CheckpointError(f"{folder} is in the original LLaVA layout (no text_config); only the llava-hf layout is read")
    raise CheckpointError(f"{folder} has model_type {kind!r}; supported are 'llava' (llava-hf) and 'llama'")


def load_core(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LlamaCore | LlavaCore:
    """Load the packed core that the folder's config describes, in eval mode; dtype None keeps each tensor's own."""
    config = load_config(folder)
    with torch.device("meta"):
        core = LlavaCore(config) if isinstance(config, LlavaConfig) else LlamaCore(config)
    load_weights(core, folder, dtype=dtype, device=device)
    return core.eval()


def load_weights(model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
    """Fill a model whose parameters are on the meta device from a folder's safetensors.

    Raises: CheckpointError, before anything is filled where names or shapes are wrong.
    """
    tensors = TensorFolder(folder)
    try:
        tied = _tied_names(model)
        targets = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
        layout = LLAVA_HF if isinstance(model, LlavaCore) else LLAMA
        plan = plan_load(layout, {name: spec.shape for name, spec in tensors.specs.items()}, targets, tied=tied)
        for source in tensors.in_file_order():
            if source in plan:
                tensor = tensors.read(source)
                _check_finite(tensor, source)
                _assign(model, plan[source], tensor.to(device=device, dtype=tensor.dtype if dtype is None else dtype))
    finally:
        tensors.close()
    for name, owner in tied.items():
        _set(model, name, model.get_parameter(owner))


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a shared parameter to its first one."""
    first: dict[int, str] = {}
    tied = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in first:
            tied[name] = first[id(weight)]
        first.setdefault(id(weight), name)
    return tied


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is stored as {tensor.dtype}; only floating-point weights are read")
    _set(model, name, nn.Parameter(tensor))


def _set(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, weight)


def _check_finite(tensor: Tensor, name: str) -> None:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _FINITE_CHUNK):
        if not bool(torch.isfinite(flat[start : start + _FINITE_CHUNK]).all()):
            raise CheckpointError(f"tensor {name} holds NaN or infinite values; the checkpoint is damaged")
