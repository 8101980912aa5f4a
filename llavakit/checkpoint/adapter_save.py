"""LoRA that was trained here: PEFT's folder for the classes of transformers, written and read back.

Owns: save_adapter, restore_adapter. Refuses: what PEFT cannot hold (parameters that are no module's weight or bias, weights that train
beside their own factors, a table that embedding and head share).
Invariants: all factors and every other parameter that trains are in the folder with their bits, and nothing else is; modules are named by
their whole paths; reading back fills all of them or none. How the frozen weights are stored, dense or packed, is not said: an adapter does
not depend on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoint.adapter_export import class_places, whole_problems
from llavakit.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS, WHOLE, Adapter
from llavakit.checkpoint.card import find_origins, write_adapter_terms
from llavakit.checkpoint.factors import open_for_core
from llavakit.checkpoint.hf import SideFiles
from llavakit.checkpoint.load import tied_names
from llavakit.errors import CheckpointError, ConfigError, shortened
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.lora_config import LoraConfig
from llavakit.model.lora_linear import LoraLinear
from llavakit.storage.documents import write_json
from llavakit.storage.folder import atomic_folder, new_folder
from llavakit.storage.tensors import write_file

__all__ = ["restore_adapter", "save_adapter"]

_Core = LlamaCore | LlavaCore
_FACTORS = ("lora_A", "lora_B")


def save_adapter(
    core: _Core,
    destination: Path,
    *,
    base: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    processor: SideFiles | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a core's factors, and whatever else trains, as an adapter's folder, and return the names of its tensors.

    What trains beside the factors becomes modules_to_save. base is the folder or hub id of the model that the core was loaded from; its
    licences go along. weights hold the values by our names where the core does not (None: its own). processor's files tell the template and
    preprocessing that it was trained with. Raises: ConfigError; StorageError where
    the destination exists and overwrite is False (an empty folder may).
    """
    config, places = _config(core), class_places(core)
    trained = {name: weight.detach() if weights is None else weights[name] for name, weight in _trained(core).items()}
    whole = [name for name in trained if not _is_factor(name)]
    adapted = sorted({places[name][0] for name in trained if _is_factor(name)})
    saved = sorted({places[name][0] for name in whole})
    if problems := _problems(core, whole) + whole_problems(saved, places, whole):
        raise ConfigError(f"what trains cannot be an adapter: {'; '.join(shortened(problems))}")
    named = {ADAPTER_PREFIX + ".".join(places[name]) + (".weight" if _is_factor(name) else ""): name for name in trained}
    specs = {stored: (trained[name].dtype, tuple(trained[name].shape)) for stored, name in named.items()}
    stated, origins = (None, ()) if base is None else (str(base), find_origins([Path(base)]))
    with atomic_folder(destination, overwrite=True) if overwrite else new_folder(destination) as folder:
        write_json(folder / ADAPTER_CONFIG, _settings(config, base=stated, adapted=adapted, saved=saved))
        write_file(folder / ADAPTER_WEIGHTS, specs, ((stored, trained[name]) for stored, name in named.items()))
        write_adapter_terms(folder, destination.name, stated, origins)
        if processor is not None:
            processor.save_pretrained(folder)
    return list(named)


def restore_adapter(core: _Core, folder: Path) -> None:
    """Fill a core's factors, and whatever else trains, from an adapter's folder, to go on with them; surgery.freeze comes first.

    Raises: CheckpointError, before anything is filled, unless it holds just these, in the same shapes and with the same scale.
    """
    config, trained = _config(core), _trained(core)
    with contextlib.closing(open_for_core(folder, core, allow_pickle=False)) as adapter:
        stored = _stored(adapter)
        problems = [f"{name} trains, and it does not hold it" for name in trained if name not in stored]
        problems += [f"it holds {name}, which does not train" for name in stored if name not in trained]
        for name in [name for name in trained if name in stored]:
            found, wanted = adapter.tensors.specs[stored[name]].shape, tuple(trained[name].shape)
            if found != wanted:
                problems.append(f"{name} has shape {list(found)}, expected {list(wanted)}")
        scales = {adapter.scale(change) for change in adapter.changes.values() if change.pair is not None}
        problems += [f"its products are scaled by {scale}, the model's by {config.scale}" for scale in sorted(scales - {config.scale})]
        if problems:
            raise CheckpointError(f"the adapter {folder} does not fit what trains: {'; '.join(shortened(problems))}")
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(adapter.tensors.read(stored[name]))


def _trained(core: _Core) -> dict[str, Tensor]:
    """Return the factors and what else trains, by our names."""
    return {name: weight for name, weight in core.named_parameters() if weight.requires_grad or _is_factor(name)}


def _problems(core: _Core, whole: Sequence[str]) -> list[str]:
    """List what trains beside its own factors, or in two places at once."""
    paths = {path for path, module in core.named_modules() if isinstance(module, LoraLinear)}
    shared = {owner: name for name, owner in tied_names(core).items()}
    doubled = [f"{name} trains beside its own factors; freeze it" for name in whole if name.rpartition(".base.")[0] in paths]
    return doubled + [f"{name} trains, which is {shared[name]} as well; freeze it" for name in whole if name in shared]


def _is_factor(name: str) -> bool:
    return name.endswith(_FACTORS)


def _stored(adapter: Adapter) -> dict[str, str]:
    """Return the names of an adapter's tensors by those of our parameters. Raises: CheckpointError for other kinds of changes."""
    stored: dict[str, str] = {}
    for target, change in adapter.changes.items():
        if change.is_sum:
            stored |= {f"{target.removesuffix('weight')}{kind}": change.names[kind] for kind in _FACTORS}
        elif set(change.names) == {WHOLE}:
            stored[target] = change.names[WHOLE]
        else:
            raise CheckpointError(f"the adapter has {', '.join(change.names)} for {change.path}; lora_A and lora_B can be trained on")
    return stored


def _settings(config: LoraConfig, *, base: str | None, adapted: Sequence[str], saved: Sequence[str]) -> dict[str, Any]:
    """Write adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # vLLM wants an integer
        "lora_dropout": config.dropout,
        "use_rslora": config.is_rank_stabilized,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": adapted,
        "modules_to_save": saved or None,
    }


def _config(core: _Core) -> LoraConfig:
    """Return the settings of a core's factors. Raises: ConfigError where there are none, or of several kinds."""
    configs = list(dict.fromkeys(module.config for module in core.modules() if isinstance(module, LoraLinear)))
    if len(configs) != 1:
        raise ConfigError(f"an adapter has factors of one LoraConfig, the model has {len(configs)}; surgery.add_lora adds some")
    return configs[0]
