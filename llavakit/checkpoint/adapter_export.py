"""An adapter that stays one: PEFT's folder for the classes of transformers, from one that was trained in any class.

Owns: export_adapter; class_places and whole_problems, which hold for any adapter that is written. Refuses: merging and casting; what PEFT
cannot hold (parameters that are no module's weight or bias).
Invariants: every tensor keeps its bits; the settings name the very modules that the adapter changed, by their whole paths, whatever
suffixes, patterns or layers they were written with; what was trained beside the adapter becomes modules_to_save.
Source: peft's get_peft_model_state_dict and set_peft_model_state_dict (names), check_target_module_exists and get_pattern_key (settings).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS, WHOLE, Adapter, Change
from llavakit.checkpoint.card import find_origins, write_adapter_terms
from llavakit.checkpoint.layouts import LLAMA, LLAVA_HF, LLAVA_MODULES
from llavakit.checkpoint.load import build_core, load_config
from llavakit.checkpoint.parts import Part, Sources, is_adapter, open_adapter
from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError, ConfigError, shortened
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.storage.documents import write_json
from llavakit.storage.folder import new_folder
from llavakit.storage.tensors import TensorSource, write_file

__all__ = ["class_places", "export_adapter", "whole_problems"]

_SUFFIXES = {
    "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
}  # fmt: skip
"""How PEFT's files name the tensors of a module."""
_LEAVES = ("weight", "bias")
_REPLACED = ("exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping")
"""Settings that choose modules, or a class, by names of the old one."""
_Place = tuple[TensorSource, str]


def export_adapter(source: Path, destination: Path, sources: Sources, *, hashes: bool = True, is_dry: bool = False) -> list[str]:
    """Write an adapter's folder for transformers' classes, and return the names of its tensors. The base's weights are not read.

    hashes writes SHA-256 sums into the manifest. Raises: CheckpointError, ConfigError; StorageError where the destination exists (an empty
    folder may).
    """
    if not is_adapter(source):
        raise ConfigError(f"{source} is no adapter (it has no {ADAPTER_CONFIG}); only an adapter can be written as one")
    core = build_core(load_config(source, sources))
    with open_adapter(source, core, sources) as (adapter, trained):
        shapes = {name: tuple(weight.shape) for name, weight in core.named_parameters(remove_duplicate=False)}
        whole, problems = _whole(adapter, trained, shapes)
        export = _Export(adapter, class_places(core), whole)
        problems = problems or whole_problems(export.saved, export.places, whole)
        if problems:
            raise CheckpointError(f"the adapter cannot be written for transformers' class: {'; '.join(shortened(problems))}")
        tensors = export.tensors()
        if not is_dry:
            specs = {name: (file.specs[stored].dtype, file.specs[stored].shape) for name, (file, stored) in tensors.items()}
            with new_folder(destination, hashes=hashes) as folder:
                settings = export.settings(sources.base)
                write_json(folder / ADAPTER_CONFIG, settings)
                write_file(folder / ADAPTER_WEIGHTS, specs, ((name, file.read(stored)) for name, (file, stored) in tensors.items()))
                write_adapter_terms(folder, destination.name, settings["base_model_name_or_path"], find_origins([source]))
    return list(tensors)


def class_places(core: LlamaCore | LlavaCore) -> dict[str, tuple[str, str]]:
    """Return the module of each weight in transformers' class, and what it is in it; by our names, shared weights by all of theirs."""
    layout = LLAVA_MODULES if isinstance(core, LlavaCore) else LLAMA
    return {name: _module_and_leaf(layout, name) for name, _ in core.named_parameters(remove_duplicate=False)}


def whole_problems(saved: Collection[str], places: Mapping[str, tuple[str, str]], whole: Collection[str]) -> list[str]:
    """List what modules_to_save cannot say: PEFT wants all of a module, and no parameter that is none's weight or bias."""
    parts = [(target, module, leaf) for target, (module, leaf) in places.items() if module in saved]
    strange = [f"{target}, trained whole, is no module's weight or bias" for target, _, leaf in parts if leaf not in _LEAVES]
    return strange + [f"{module} was trained whole without its {leaf}" for target, module, leaf in parts if target not in whole]


@dataclass(frozen=True, slots=True)
class _Export:
    """The new folder."""

    adapter: Adapter
    places: Mapping[str, tuple[str, str]]
    """The module of each weight in the new class, and what it is in it; by our names."""
    whole: Mapping[str, _Place]
    """Weights that were trained as they are."""

    @property
    def adapted(self) -> dict[str, Change]:
        """Modules with factors."""
        return {self.places[target][0]: change for target, change in self.adapter.changes.items() if change.pair is not None}

    @property
    def saved(self) -> list[str]:
        """Modules without factors that the adapter brings; biases that were trained everywhere need no mention."""
        has_biases = self.adapter.config.get("bias", "none") != "none"
        places = [self.places[target] for target in self.whole]
        return sorted({module for module, leaf in places if not (has_biases and leaf == "bias")} - set(self.adapted))

    def tensors(self) -> dict[str, _Place]:
        """Return where each tensor comes from, by its new name."""
        adapted = self.adapted
        named: dict[str, _Place] = {}
        for module, change in adapted.items():
            named |= {f"{module}.{_SUFFIXES[kind]}": (self.adapter.tensors, name) for kind, name in change.names.items() if kind != WHOLE}
        for target, place in self.whole.items():
            module, leaf = self.places[target]
            named[f"{module}.base_layer.{leaf}" if module in adapted else f"{module}.{leaf}"] = place
        return {f"{ADAPTER_PREFIX}{name}": place for name, place in named.items()}

    def settings(self, base: str | Path | None) -> dict[str, Any]:
        """Write adapter_config.json, in which every module is named in full; a base of another class is not named."""
        config, adapted = self.adapter.config, self.adapted
        stated = config.get("base_model_name_or_path") if base is None else str(base)
        ranks = {re.escape(module): self.adapter.rank(change) for module, change in adapted.items()}
        alphas = {re.escape(module): self.adapter.alpha(change) for module, change in adapted.items()}
        return {
            **config,
            **dict.fromkeys(_REPLACED),
            "base_model_name_or_path": stated if self.adapter.layout in (LLAVA_HF, LLAMA) else None,
            "target_modules": sorted(adapted),
            "modules_to_save": self.saved or None,
            "rank_pattern": {module: rank for module, rank in ranks.items() if rank != config.get("r", 8)},
            "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != config.get("lora_alpha", 8)},
        }


def _whole(adapter: Adapter, trained: Sequence[Part], shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, _Place], list[str]]:
    """Find the weights that were trained as they are, in the adapter or beside it, and what fits no weight of the model."""
    found: dict[str, _Place] = {t: (adapter.tensors, change.names[WHOLE]) for t, change in adapter.changes.items() if change.is_whole}
    problems = adapter.problems(shapes)
    for part in trained:
        for name in [name for name in part.tensors.specs if part.layout.drop_reason(name) is None]:
            target = part.layout.target(name)
            if target is None or target not in shapes or target in adapter.changes:
                problems.append(f"{name}, trained beside it, is no weight of the model, or one that it changes as well")
            else:
                found[target] = part.tensors, name
    for target, (file, name) in found.items():
        if (shape := file.specs[name].shape) != shapes.get(target, shape):
            problems.append(f"{name} has shape {list(shape)}, expected {list(shapes[target])}")
    return found, problems


def _module_and_leaf(layout: Layout, name: str) -> tuple[str, str]:
    found = layout.source(name)
    assert found is not None, "the layout names every tensor of ours"
    module, _, leaf = found.rpartition(".")
    return module, leaf
