"""A trained adapter as PEFT's folder for the classes of transformers: what was trained beside the products goes along whole.

Owns: adapter_parameters, check_adapter, write_adapter. Refuses: merging (surgery.merge_lora, llava merge), and a base's own weights, which
stay where they are.
Invariants: factors keep their float32 bits; the settings name the very modules that were adapted; the base's weights are not written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoint.adapter_export import module_and_leaf
from llavakit.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS
from llavakit.checkpoint.card import find_origins, write_adapter_terms
from llavakit.checkpoint.layouts import LLAMA, LLAVA_MODULES
from llavakit.errors import ConfigError
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.lora_config import LoraConfig
from llavakit.model.lora_layer import lora_layers
from llavakit.storage.documents import write_json
from llavakit.storage.tensors import write_file

__all__ = ["adapter_parameters", "check_adapter", "write_adapter"]

_BASE = ".base."


def adapter_parameters(core: LlamaCore | LlavaCore) -> dict[str, tuple[str, torch.nn.Parameter]]:
    """Return what an adapter of this model holds: each trained parameter by its own name, with its name in PEFT's file."""
    layout = LLAVA_MODULES if isinstance(core, LlavaCore) else LLAMA
    layers = lora_layers(core)
    found: dict[str, tuple[str, torch.nn.Parameter]] = {}
    for name, weight in core.named_parameters():
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf in ("lora_A", "lora_B"):
            module, _ = module_and_leaf(layout, f"{path}.weight")
            found[name] = f"{ADAPTER_PREFIX}{module}.{leaf}.weight", weight
        elif weight.requires_grad:
            module, leaf = module_and_leaf(layout, name.replace(_BASE, "."))
            found[name] = f"{ADAPTER_PREFIX}{module}.{leaf}", weight
    return found


def check_adapter(core: LlamaCore | LlavaCore) -> None:
    """Check that an adapter can hold what trains. Raises: ConfigError naming what it cannot."""
    whole = {name for name, weight in core.named_parameters() if weight.requires_grad and not name.endswith((".lora_A", ".lora_B"))}
    for name in whole:
        module, _, leaf = name.rpartition(".")
        missing = {other for other, _ in core.named_parameters() if other.rpartition(".")[0] == module} - whole
        if leaf not in ("weight", "bias") or _BASE in name or missing:
            raise ConfigError(
                f"an adapter cannot hold {name}, which trains beside it: it takes whole modules that are not adapted; change trainable"
            )


def write_adapter(
    core: LlamaCore | LlavaCore,
    config: LoraConfig,
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    base: str,
    source: Path | None,
) -> None:
    """Write an adapter's files into a folder; tensors are those of adapter_parameters, by their own names and in its order.

    base is the folder or hub id that the settings name as what the adapter belongs to, source where its licence lies.
    """
    named = adapter_parameters(core)
    specs = {stored: (weight.dtype, tuple(weight.shape)) for stored, weight in named.values()}
    write_json(folder / ADAPTER_CONFIG, _settings(config, [stored for stored, _ in named.values()], base))
    write_file(folder / ADAPTER_WEIGHTS, specs, ((named[name][0], tensor) for name, tensor in tensors))
    write_adapter_terms(folder, folder.name, base, find_origins([] if source is None else [source]))


def _settings(config: LoraConfig, stored: list[str], base: str) -> Mapping[str, Any]:
    paths = [name.removeprefix(ADAPTER_PREFIX) for name in stored]
    adapted = {path.removesuffix(".lora_A.weight") for path in paths if path.endswith(".lora_A.weight")}
    whole = {path.rpartition(".")[0] for path in paths if not path.endswith((".lora_A.weight", ".lora_B.weight"))}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.is_rank_stabilized,
        "use_dora": False,
        "target_modules": sorted(adapted),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
