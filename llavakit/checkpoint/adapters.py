"""PEFT's LoRA adapters, merged into a model's weights as these are read.

Owns: Adapter (what an adapter's folder adds to which weight) and Merged, the tensors of a part with an adapter in them.
Invariants: every tensor of an adapter is used or the folder is refused, before a weight is read; products and sums are made in float32.
Sources: peft's LoraConfig, get_delta_weight and DoRA's weight norm. Names: base_model.model.PATH.lora_A.weight, where PATH is the
module's in the class that was trained, so the part's layout knows it.
Legend: R rank  O rows out  I columns in
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError, shortened
from llavakit.storage.documents import read_json
from llavakit.storage.hub import check_inside
from llavakit.storage.pickle_tensors import PickleFile
from llavakit.storage.tensors import FilePlace, OpenTensors, TensorFile, TensorSource, TensorSpec

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_PREFIX",
    "ADAPTER_WEIGHTS",
    "WHOLE",
    "Adapter",
    "Change",
    "Merged",
    "base_of_adapter",
    "open_adapter_file",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")
_KEY = re.compile(r"(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?")
_PLAIN = re.compile(r"(?P<path>.+?)(\.modules_to_save|\.base_layer)?(\.default)?\.(?P<kind>weight|bias)")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_PAIRS = (("lora_A", "lora_B"), _EMBEDDING)
_MAGNITUDE = "lora_magnitude_vector"
_CHANGED_BASES = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of init_lora_weights with which peft takes the first factors, or a rounding, out of the base before it trains."""
_MOST = 1e9
WHOLE = "whole"
"""The kind of a tensor that takes a weight's place."""


@dataclass(slots=True)
class Change:
    """What an adapter does to one weight: names of its tensors by their kind."""

    path: str
    names: dict[str, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the adapter brings the weight itself."""
        return WHOLE in self.names

    @property
    def pair(self) -> tuple[str, str] | None:
        """The kinds of the two factors of what it adds, if it adds something."""
        return next((pair for pair in _PAIRS if all(kind in self.names for kind in pair)), None)

    @property
    def is_sum(self) -> bool:
        """Whether all it does is to add a product of two factors to a matrix that is no embedding."""
        return set(self.names) == set(_PAIRS[0])


class Adapter:
    """An opened adapter's folder."""

    def __init__(self, folder: Path, layout: Layout, *, allow_pickle: bool) -> None:
        """Open it. Raises: CheckpointError for kinds of adapters other than LoRA, and tensors whose names are not understood."""
        self.config, self.layout = read_json(folder / ADAPTER_CONFIG), layout
        _check_config(self.config)
        self.tensors: OpenTensors = open_adapter_file(folder, allow_pickle=allow_pickle)
        try:
            self.changes = _changes(self.tensors, layout)
        except CheckpointError:
            self.close()
            raise

    def whole_spec(self, target: str) -> TensorSpec | None:
        """Return the spec of a weight that the adapter brings itself."""
        change = self.changes.get(target)
        return None if change is None or not change.is_whole else self.tensors.specs[change.names[WHOLE]]

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """List the changes that fit no weight of the model."""
        found = []
        for target, change in self.changes.items():
            shape = shapes.get(target)
            if shape is None:
                found.append(f"{change.path} is no module of the model")
            elif change.pair is not None:
                found += self._misfits(change, change.pair, shape)
        return found

    def rank(self, change: Change) -> int | None:
        """Return the rank of what a change adds; None where it adds nothing."""
        return None if change.pair is None else self.tensors.specs[change.names[change.pair[0]]].shape[0]

    def alpha(self, change: Change) -> Any:
        """Return lora_alpha of a changed module."""
        return _by_pattern(self.config.get("alpha_pattern"), change.path, self.config.get("lora_alpha", 8))

    def scale(self, change: Change) -> float:
        """Return the factor of the product that a change adds."""
        rank = self.rank(change)
        assert rank is not None, "it adds one"
        return float(self.alpha(change)) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def apply(self, target: str, weight: Tensor) -> Tensor:
        """Return a weight with the adapter in it, in its own dtype."""
        change = self.changes.get(target)
        if change is None:
            return weight
        if change.is_whole:
            weight = self.tensors.read(change.names[WHOLE]).to(weight.dtype)
        if change.pair is None:
            return weight
        product = self._product(change, change.pair)
        if _MAGNITUDE not in change.names:
            return (weight.float() + product).to(weight.dtype)
        magnitude_O = self.tensors.read(change.names[_MAGNITUDE]).float().flatten()
        changed = weight.float() + product
        factor_O: Tensor = magnitude_O / torch.linalg.norm(changed, dim=1)
        return (factor_O.view(-1, 1) * changed).to(weight.dtype)

    def factors(self, target: str) -> tuple[Tensor, Tensor]:
        """Read the factors a_RI and b_OR of a weight's sum, float32, the scale in b."""
        change = self.changes[target]
        a_RI, b_OR = (self.tensors.read(change.names[kind]).float() for kind in _PAIRS[0])
        return a_RI, b_OR * self.scale(change)

    def close(self) -> None:
        """Close the file."""
        self.tensors.close()

    def _product(self, change: Change, pair: tuple[str, str]) -> Tensor:
        a_RI, b_OR = (self.tensors.read(change.names[kind]).float() for kind in pair)
        product = b_OR @ a_RI
        return (product.T if pair == _EMBEDDING else product) * self.scale(change)

    def _misfits(self, change: Change, pair: tuple[str, str], shape: tuple[int, ...]) -> list[str]:
        """List what the factors of a weight of that shape, and its magnitudes, have against it or each other."""
        a, b = (self.tensors.specs[change.names[kind]].shape for kind in pair)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            return [f"{change.path} has factors {list(a)} and {list(b)}, which are no matrices of one rank"]
        wanted = (a[1], b[0]) if pair == _EMBEDDING else (b[0], a[1])
        if wanted != shape:
            return [f"{change.path} is made for a weight {list(wanted)}, the model has {list(shape)}"]
        if _MAGNITUDE not in change.names:
            return []
        lengths = self.tensors.specs[change.names[_MAGNITUDE]].shape
        return [] if math.prod(lengths) == shape[0] else [f"{change.path} has magnitudes {list(lengths)} for {shape[0]} rows"]


class Merged:
    """The tensors of a part, with an adapter merged into them."""

    def __init__(self, tensors: TensorSource, layout: Layout, adapter: Adapter) -> None:
        self._tensors, self._layout, self._adapter = tensors, layout, adapter
        self.specs: Mapping[str, TensorSpec] = {name: self._spec(name, spec) for name, spec in tensors.specs.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor, merged."""
        tensor, target = self._tensors.read(name), self._layout.target(name)
        return tensor if target is None else self._adapter.apply(target, tensor)

    def place(self, name: str) -> FilePlace | None:
        """Return where the bytes of a tensor that the adapter leaves alone lie."""
        target = self._layout.target(name)
        return None if target in self._adapter.changes else self._tensors.place(name)

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order that disks like."""
        return self._tensors.in_file_order()

    def _spec(self, name: str, spec: TensorSpec) -> TensorSpec:
        target = self._layout.target(name)
        whole = None if target is None else self._adapter.whole_spec(target)
        return spec if whole is None else TensorSpec(spec.dtype, whole.shape, spec.start, spec.stop)


def base_of_adapter(folder: Path) -> str:
    """Return the model that an adapter says it was made for. Raises: CheckpointError."""
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder} does not say which model it adapts; name it with --base")
    return name


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"the adapter is of the kind {kind!r}; LORA is read")
    if config.get("fan_in_fan_out"):
        raise CheckpointError("the adapter is made for transposed weights (fan_in_fan_out), which no Llama has")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise CheckpointError(
            f"the adapter began with init_lora_weights={start!r}, for which peft changes the base, so it does not fit the plain one: save "
            "it as plain LoRA by peft's save_pretrained(..., path_initial_model_for_weight_conversion=...); where the changed base itself "
            f"was saved, name it with --base and set init_lora_weights to true in {ADAPTER_CONFIG}"
        )
    for name in ("lora_alpha", "r"):
        _check_number(name, config.get(name, 8))
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(name)
        if not isinstance(patterns, Mapping | None):
            raise CheckpointError(f"{ADAPTER_CONFIG} has {name}={patterns!r}; a table of modules and numbers is needed")
        for pattern, value in ({} if patterns is None else patterns).items():
            _check_number(f"{name}[{pattern!r}]", value)
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{ADAPTER_CONFIG} has the pattern {pattern!r}, which is none: {error}") from error


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST:
        raise CheckpointError(f"{ADAPTER_CONFIG} has {name}={str(value)[:100]!r}; a number is needed")


def open_adapter_file(folder: Path, *, allow_pickle: bool) -> OpenTensors:
    """Open an adapter's tensors. Raises: CheckpointError."""
    safe, pickled = (folder / name for name in _FILES)
    if safe.is_file():
        check_inside(safe, folder)
        return TensorFile(safe)
    if pickled.is_file() and allow_pickle:
        check_inside(pickled, folder)
        return PickleFile(pickled)
    hint = "only adapter_model.bin, a pickle file; where you trust its origin, set allow_pickle" if pickled.is_file() else "no weights"
    raise CheckpointError(f"the adapter {folder} has {hint}")


def _changes(file: OpenTensors, layout: Layout) -> dict[str, Change]:
    """Sort an adapter's tensors by the weight they change. Raises: CheckpointError listing what is not understood."""
    changes: dict[str, Change] = {}
    problems = []
    for name in file.specs:
        key = name.removeprefix(ADAPTER_PREFIX)
        match, is_whole = _KEY.fullmatch(key), False
        if match is None:
            match, is_whole = _PLAIN.fullmatch(key), True
        target = None if match is None else layout.target(f"{match['path']}.{match['kind'] if is_whole else 'weight'}")
        if match is None or target is None:
            problems.append(name)
            continue
        change = changes.setdefault(target, Change(match["path"]))
        change.names[WHOLE if is_whole else match["kind"]] = name
    problems += [change.path for change in changes.values() if change.pair is None and set(change.names) != {WHOLE}]
    if problems:
        raise CheckpointError(f"the adapter's tensors are not understood: {', '.join(shortened(problems))}")
    return changes


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first pattern that ends a module's path, as peft looks it up."""
    values = {} if patterns is None else patterns
    return next((value for pattern, value in values.items() if re.fullmatch(rf"(.*\.)?({pattern})", path)), default)
