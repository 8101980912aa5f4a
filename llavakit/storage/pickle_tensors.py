"""Tensors in the pickle files that torch.save writes (pytorch_model.bin), for those who ask for them.

Owns: PICKLE, the WeightFormat of these files for TensorFolder, and the only torch.load of the package.
Invariants: the unpickler builds tensors, dictionaries and numbers and refuses everything else (weights_only), so no code of the
file runs; files of torch 1.6 and later are mapped and their tensors read by offset, so memory holds what was read; every tensor that is
read owns its memory, also where the file shares one storage among several. Files of older versions are read whole.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from llavakit.errors import CheckpointError
from llavakit.storage.tensors import DTYPES, FilePlace, TensorSpec, WeightFormat, sorted_by_place

__all__ = ["PICKLE", "PickleFile"]

# What torch.load raises for damaged or foreign files; found by changing bytes of good ones.
_DAMAGE = (
    UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, OSError,
    ArithmeticError, BadZipFile, struct.error,
)  # fmt: skip


class PickleFile:
    """One file of torch.save that holds a table of names and tensors."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises: CheckpointError when it is damaged or holds anything but named tensors."""
        self.path = path
        self._tensors, is_mapped = _load(path)
        self._areas = _mapped_areas(path) if is_mapped else []
        self.specs: Mapping[str, TensorSpec] = {name: _spec(tensor) for name, tensor in self._tensors.items()}
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype into memory of its own: by its place in the file where that is known."""
        spec, place = self.specs[name], self.place(name)
        if place is None:
            return self._tensors[name].clone(memory_format=torch.contiguous_format)
        return place.read(spec.num_bytes).view(spec.dtype).view(spec.shape)

    def place(self, name: str) -> FilePlace | None:
        """Return where a tensor lies, where the system tells and its values follow one another."""
        spec = self.specs[name]
        area = next((area for area in self._areas if area.holds(spec)), None)
        if area is None or not self._tensors[name].is_contiguous():
            return None
        return FilePlace(self.path, self._descriptor, area.place(spec))

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order of their data."""
        return iter(sorted_by_place(self.specs))

    def close(self) -> None:
        """Let go of the mapping; reading afterwards is an error."""
        self._tensors = {}
        os.close(self._descriptor)


PICKLE = WeightFormat("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", PickleFile)


def _load(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Load a file's table and say whether its tensors are mapped from it."""
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is missing or no regular file")
    try:
        is_mapped = is_zipfile(path)
        if is_mapped:
            _check_archive(path)
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged, or holds something else than tensors: {reason[:200]}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; a table of names and tensors was expected")
    for name, value in values.items():
        kind = _strange_kind(value)
        if not isinstance(name, str) or kind is not None:
            raise CheckpointError(f"{path} holds {str(name)[:100]!r}, {kind or 'a tensor'}; only plain tensors under names are read")
    return {name: value.detach() for name, value in values.items()}, is_mapped


def _strange_kind(value: object) -> str | None:
    """Say what a value is that is no plain tensor, or claims more bytes than the file has of it: a tensor of 64 GiB fits in 1 KB."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        return f"a sparse, quantised, nested or empty {type(value).__name__}"
    if value.dtype not in DTYPES:
        return f"a tensor of {value.dtype}"
    num_bytes, num_stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    return f"a tensor of {num_bytes} bytes of which {num_stored} are stored" if num_bytes > num_stored else None


@dataclass(frozen=True, slots=True)
class _Area:
    """A stretch of memory that the system fills from a file."""

    start: int
    stop: int
    offset: int
    """Of its start in the file."""

    def holds(self, spec: TensorSpec) -> bool:
        return self.start <= spec.start and spec.stop <= self.stop

    def place(self, spec: TensorSpec) -> int:
        return self.offset + spec.start - self.start


def _mapped_areas(path: Path) -> list[_Area]:
    """Return where a file is mapped, as Linux tells it; elsewhere nothing is known and tensors are copied through the mapping."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    areas = []
    for line in lines:
        addresses, _, offset, _, _, *name = line.split(maxsplit=5)
        if name and name[0] == str(path.resolve()):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            areas.append(_Area(start, stop, int(offset, 16)))
    return areas


def _check_archive(path: Path) -> None:
    """Refuse compressed entries, with which a small file would grow in memory, and the other byte order. Raises: CheckpointError."""
    with ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != ZIP_STORED:
                raise CheckpointError(f"{path} is a compressed archive; torch.save writes none")
            if entry.filename.endswith("/byteorder") and archive.open(entry).read(16) != sys.byteorder.encode():
                raise CheckpointError(f"{path} was written in another byte order than this machine's, which is {sys.byteorder}-endian")


def _spec(tensor: Tensor) -> TensorSpec:
    start = tensor.data_ptr()
    return TensorSpec(tensor.dtype, tuple(tensor.shape), start, start + tensor.numel() * tensor.element_size())
