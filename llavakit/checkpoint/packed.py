"""GPTQ and AWQ: folders whose weights are packed integers, shown as dense tensors.

Owns: Packing (what a folder says of its weights), Unpacked (its tensors without the packing), dense_tensors, weight_format.
Invariants: names, shapes and group indices are checked before a weight is read, and all problems told at once; a weight is unpacked when
it is read, so memory holds one module. Files say how they are packed in config.json (quantization_config), AutoGPTQ's
quantize_config.json or AutoAWQ's quant_config.json; whether they are packed their tensors' names decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoint.placement import dtype_name
from llavakit.errors import CheckpointError, shortened
from llavakit.ops.quantize.layouts import LAYOUTS, PackedLayout, dequantize, num_groups
from llavakit.storage.documents import read_json, read_optional_json
from llavakit.storage.tensors import SAFETENSORS, FilePlace, TensorSource, TensorSpec, WeightFormat

__all__ = ["Packing", "Unpacked", "dense_tensors", "packing_of_config", "weight_format"]

_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Of older writers, with the method where the file states none."""
_VERSION_KEYS = {"gptq": ("checkpoint_format", "format"), "awq": ("version", "format", "checkpoint_format")}
_VERSIONS = {"gptq": "gptq", "awq": "gemm"}
_WORDS, _ZEROS, _SCALES, _INDEX, _BIAS = ".qweight", ".qzeros", ".scales", ".g_idx", ".bias"
_WEIGHT = ".weight"
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SUPPORTED = "GPTQ (gptq, gptq_v2) of 2, 3, 4 and 8 bits and AWQ (gemm) of 4 are read"


@dataclass(frozen=True, slots=True)
class Packing:
    """How the weights of a folder are packed."""

    layout: PackedLayout
    group_size: int
    """Inputs that share a scale; -1 means all."""
    name: str
    """As people call it."""


def packing_of_config(values: Mapping[str, Any]) -> Packing | None:
    """Read what config.json says, at its top or of its language model; None where it says nothing. Raises: CheckpointError."""
    text = values.get("text_config")
    for part in (values, text if isinstance(text, Mapping) else {}):
        if (stated := part.get("quantization_config")) is not None:
            return _read_packing(stated, "config.json", "by an unknown method")
    return None


def weight_format(folder: Path) -> WeightFormat:
    """Return the format of a folder's safetensors; AutoGPTQ gives the one file of a quantised model names of its own."""
    if SAFETENSORS.is_in(folder) or not _states_packing(folder):
        return SAFETENSORS
    files = [file.name for file in folder.glob(f"*{SAFETENSORS.suffix}")]
    return replace(SAFETENSORS, single_name=files[0]) if len(files) == 1 else SAFETENSORS


def dense_tensors(tensors: TensorSource, folder: Path) -> TensorSource:
    """Show a folder's tensors as dense ones, whether they are packed or not. Raises: CheckpointError."""
    stated = packing_of_config(read_optional_json(folder / "config.json"))
    if not any(name.endswith(_WORDS) for name in tensors.specs):
        if stated is not None:
            raise CheckpointError(f"{folder}: config.json has a quantization_config, but no tensor is packed; if all are dense, remove it")
        return tensors
    packing = _packing_beside(folder) if stated is None else stated
    if packing is None:
        files = " or ".join(_SIDE_FILES)
        raise CheckpointError(f"{folder} holds packed tensors; how, quantization_config in config.json, {files} has to say")
    return Unpacked(tensors, packing, folder)


class Unpacked:
    """A quantised folder's tensors: MODULE.qweight and its companions are MODULE.weight [out, in], all others are as they are."""

    def __init__(self, tensors: TensorSource, packing: Packing, folder: Path) -> None:
        """Take the tensors, open. Raises: CheckpointError listing what does not fit the packing."""
        self._tensors, self._packing = tensors, packing
        self._stored = stored = tensors.specs
        self._modules = [name.removesuffix(_WORDS) for name in stored if name.endswith(_WORDS)]
        owned = {module + suffix for module in self._modules for suffix in (_WORDS, _ZEROS, _SCALES, _INDEX)}
        problems = [f"{name} has no {_WORDS[1:]}" for name in stored if name.endswith((_ZEROS, _SCALES, _INDEX)) and name not in owned]
        for module in self._modules:
            problems += self._problems(module)
        if problems:
            raise CheckpointError(f"{folder}: the packed tensors are not whole: {'; '.join(shortened(problems))}")
        dense = {module + _WEIGHT: self._spec(module) for module in self._modules}
        self.specs: Mapping[str, TensorSpec] = {**{name: spec for name, spec in stored.items() if name not in owned}, **dense}

    @property
    def description(self) -> str:
        """The packing as people call it, and how much has it."""
        is_shuffled = any(module + _INDEX in self._stored for module in self._modules)
        return f"{self._packing.name}, {len(self._modules)} modules{', with g_idx' if is_shuffled else ''}"

    @property
    def biases(self) -> Sequence[str]:
        """The biases of packed modules."""
        return [module + _BIAS for module in self._modules if module + _BIAS in self._stored]

    def read(self, name: str) -> Tensor:
        """Read one tensor; a packed weight is unpacked, in the dtype of its scales."""
        module = name.removesuffix(_WEIGHT)
        if name in self._stored:
            return self._tensors.read(name)
        words, zero_words, scales = (self._tensors.read(module + suffix) for suffix in (_WORDS, _ZEROS, _SCALES))
        return dequantize(self._packing.layout, words, zero_words, scales, self._groups(module))

    def place(self, name: str) -> FilePlace | None:
        """Return where the bytes of a tensor that is not packed lie."""
        return self._tensors.place(name) if name in self._stored else None

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order that disks like."""
        for name in self._tensors.in_file_order():
            shown = name.removesuffix(_WORDS) + _WEIGHT if name.endswith(_WORDS) else name
            if shown in self.specs:
                yield shown

    def _spec(self, module: str) -> TensorSpec:
        words, scales = self._stored[module + _WORDS], self._stored[module + _SCALES]
        return TensorSpec(scales.dtype, self._shape(module)[::-1], words.start, words.stop)

    def _shape(self, module: str) -> tuple[int, int]:
        """Return inputs and outputs, as the words have them."""
        layout, shape = self._packing.layout, list(self._stored[module + _WORDS].shape)
        shape[layout.weight_axis] = layout.num_values(shape[layout.weight_axis])
        return shape[0], shape[1]

    def _problems(self, module: str) -> list[str]:
        """List what does not fit in the tensors of a module."""
        layout, stored, words = self._packing.layout, self._stored, self._stored[module + _WORDS]
        if len(words.shape) != 2 or words.shape[layout.weight_axis] % layout.block_words or words.dtype != torch.int32:
            return [f"{module}{_WORDS} is {_described(words)}, which no words of {layout.bits} bits are"]
        num_inputs, num_outputs = self._shape(module)
        groups = num_groups(num_inputs, self._packing.group_size)
        if num_outputs % len(layout.order):
            return [f"{module} has {num_outputs} outputs; whole blocks of {len(layout.order)} were expected"]
        wanted = {
            _ZEROS: ((groups, num_outputs // len(layout.order) * layout.block_words), (torch.int32,)),
            _SCALES: ((groups, num_outputs), _SCALE_DTYPES),
            _INDEX: ((num_inputs,), (torch.int32, torch.int64)),
        }
        found = [f"{module}{_WEIGHT} is there beside {_WORDS[1:]}"] if module + _WEIGHT in stored else []
        for suffix, (shape, dtypes) in wanted.items():
            spec = stored.get(module + suffix)
            if spec is None:
                found += [f"{module}{suffix} is missing"] if suffix != _INDEX else []
            elif suffix == _INDEX and not layout.has_group_index:
                found.append(f"{module}{suffix} is there, but this packing has none")
            elif spec.shape != shape or spec.dtype not in dtypes:
                found.append(f"{module}{suffix} is {_described(spec)}, expected {_named(dtypes)} {list(shape)}")
            elif suffix == _INDEX and num_inputs:
                lowest, highest = (int(value) for value in torch.aminmax(self._tensors.read(module + suffix)))
                found += [] if 0 <= lowest <= highest < groups else [f"{module}{suffix} names groups {lowest} to {highest} of {groups}"]
        return found

    def _groups(self, module: str) -> Tensor:
        """Return the group of each input. An index of zeros stands for none, as exllamav2 reads it."""
        num_inputs, size = self._shape(module)[0], self._packing.group_size
        if module + _INDEX in self._stored and (index := self._tensors.read(module + _INDEX)).any():
            return index.long()
        return torch.arange(num_inputs) // (num_inputs if size == -1 else min(size, num_inputs))


def _states_packing(folder: Path) -> bool:
    is_beside = any((folder / name).is_file() for name in _SIDE_FILES)
    return is_beside or packing_of_config(read_optional_json(folder / "config.json")) is not None


def _packing_beside(folder: Path) -> Packing | None:
    for name, method in _SIDE_FILES.items():
        if (folder / name).is_file():
            return _read_packing(read_json(folder / name), name, method)
    return None


def _read_packing(settings: Any, source: str, method: str) -> Packing:
    """Read settings of GPTQ or AWQ in any of their spellings. Raises: CheckpointError for everything else, by its name."""
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{source} says of the quantisation {str(settings)[:100]!r}; a table was expected")
    method = str(settings.get("quant_method", method)).lower()
    bits, group_size = settings.get("bits", settings.get("w_bit")), settings.get("group_size", settings.get("q_group_size"))
    version = _version(method, settings)
    layout = LAYOUTS.get((method, version, bits)) if type(bits) is int else None
    if layout is None:
        facts = (method[:40], version[:40], "" if bits is None else f"{bits!r:.40} bits")
        raise CheckpointError(f"{source}: the weights are quantised ({', '.join(filter(None, facts))}); {_SUPPORTED}")
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise CheckpointError(
            f"{source} states group_size={group_size!r:.40} of quantised weights; a number of inputs, or -1, was expected"
        )
    groups = "one group" if group_size == -1 else f"groups of {group_size}"
    return Packing(layout, group_size, f"{method.upper()} ({version}) of {bits} bits, {groups}")


def _version(method: str, settings: Mapping[str, Any]) -> str:
    """Name the method's variant; GPTQ's and AWQ's usual one where none is stated."""
    stated = [settings[key] for key in _VERSION_KEYS.get(method, ()) if settings.get(key) is not None]
    version = str(stated[0]).lower() if stated else _VERSIONS.get(method, "")
    if settings.get("is_marlin_format"):
        return "marlin"
    if settings.get("backend") == "llm-awq":
        return "llm-awq"
    if version == "gptq" and "gptqmodel" in str(settings.get("meta")):
        return "gptq by GPTQModel"  # which takes other numbers than 1 off zeros of 3 bits, so that these are not in the table
    return version


def _described(spec: TensorSpec) -> str:
    return f"{_named((spec.dtype,))} {list(spec.shape)}"


def _named(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(dtype_name, dtypes))
