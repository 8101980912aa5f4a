"""Tensors in safetensors files, read by offset and written one by one.

Owns: the safetensors header (parsed here, with limits), TensorFile, write_tensors, and TensorFolder, which checks a folder's
shards against their index for any WeightFormat (pickle_tensors has another one).
Refuses: pickle where it was not asked for. Invariants: no safetensors file is mapped, so memory holds only the tensors that were
asked for; nothing outside the folder is opened; a header that lies about shapes, dtypes or offsets is a CheckpointError before any
data is read.
Source: https://huggingface.co/docs/safetensors, whose reader accepts duplicate keys; this one does not.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from llavakit.errors import CheckpointError, shortened
from llavakit.storage.documents import parse_json, read_json, write_json
from llavakit.storage.hub import check_inside

__all__ = [
    "DTYPES",
    "INDEX_NAME",
    "SAFETENSORS",
    "FilePlace",
    "OpenTensors",
    "TensorFile",
    "TensorFolder",
    "TensorSource",
    "TensorSpec",
    "WeightFormat",
    "open_file",
    "read_into",
    "sorted_by_place",
    "write_file",
    "write_tensors",
]

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 32
_MAX_BYTES = 1 << 62
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
DTYPES = frozenset(_NAMES)
"""Of the tensors that are read and written."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, and where it lies: from start to stop, in bytes from the beginning of its file (or of memory)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class FilePlace:
    """Where a tensor's bytes lie, as they are, in an open file."""

    path: Path
    descriptor: int
    start: int

    def read(self, num_bytes: int, offset: int = 0) -> Tensor:
        """Read bytes from an offset on. Raises: CheckpointError."""
        data = torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes:
            self.read_into(data, offset)
        return data

    def read_into(self, data: Tensor, offset: int) -> None:
        """Fill data, uint8 [bytes], from an offset on. Raises: CheckpointError."""
        read_into(data.numpy().data, self.path, self.descriptor, self.start + offset)


class TensorFile:
    """One safetensors file, opened once and read by offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_file(path)
        try:
            self.specs: Mapping[str, TensorSpec] = _read_header(path, self._descriptor)
        except CheckpointError:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype. Raises: CheckpointError when the disk fails or the file has shrunk."""
        spec = self.specs[name]
        return self.place(name).read(spec.num_bytes).view(spec.dtype).view(spec.shape)

    def place(self, name: str) -> FilePlace:
        """Return where a tensor lies."""
        return FilePlace(self.path, self._descriptor, self.specs[name].start)

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order of their data."""
        return iter(sorted_by_place(self.specs))

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        os.close(self._descriptor)


class TensorSource(Protocol):
    """Named tensors that can be read one by one."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> dtype, shape and place."""

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype into memory of its own."""

    def place(self, name: str) -> FilePlace | None:
        """Return where a tensor's bytes lie as they are, so that it can be read in pieces; None where reading computes them."""

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order of their data: the order that disks like."""


class OpenTensors(TensorSource, Protocol):
    """A file of named tensors that is open for reading."""

    path: Path

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a kind of weight files is named and opened."""

    single_name: str
    index_name: str
    suffix: str
    open: Callable[[Path], OpenTensors]

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has the one file, or an index, of this format."""
        return self._has(folder, self.single_name) or self._has(folder, self.index_name)

    def _has(self, folder: Path, name: str) -> bool:
        return os.path.lexists(folder / name)  # what is no file, or leads nowhere, is told of when it is opened


SAFETENSORS = WeightFormat(_SINGLE_NAME, INDEX_NAME, ".safetensors", TensorFile)


class TensorFolder:
    """All tensors of a checkpoint folder: one file, or shards with an index that must agree with them exactly.

    Use it as a context manager. Where a folder has both, the one file counts, as in transformers.
    """

    def __init__(self, folder: Path, format: WeightFormat = SAFETENSORS) -> None:
        self.files: dict[str, OpenTensors] = {}
        self._owner: dict[str, OpenTensors] = {}
        self._format = format
        try:
            if os.path.lexists(folder / format.single_name):
                self._open(folder, format.single_name)
            elif (folder / format.index_name).is_file():
                self._open_shards(folder, _read_index(folder / format.index_name))
            else:
                raise CheckpointError(_without_weights(folder, format))
        except CheckpointError:
            self.close()
            raise

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> spec of every tensor."""
        return {name: file.specs[name] for name, file in self._owner.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype."""
        return self._owner[name].read(name)

    def place(self, name: str) -> FilePlace | None:
        """Return where a tensor's bytes lie as they are."""
        return self._owner[name].place(name)

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order of their data, file by file: the order that disks like."""
        for file in self.files.values():
            yield from file.in_file_order()

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, folder: Path, name: str) -> None:
        check_inside(folder / name, folder)
        file = self.files[name] = self._format.open(folder / name)
        for tensor in file.specs:
            if tensor in self._owner:
                raise CheckpointError(
                    f"tensor {tensor!r} is in {self._owner[tensor].path.name} and in {name}; each may be in one file only"
                )
            self._owner[tensor] = file

    def _open_shards(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        for name in sorted(set(weight_map.values())):
            if re.fullmatch(r"[\w.-]+", name) is None or not name.endswith(self._format.suffix):
                index, suffix = self._format.index_name, self._format.suffix
                raise CheckpointError(f"{index} names the file {name!r}; a plain file name ending in {suffix} was expected")
            self._open(folder, name)
        problems = [f"{tensor} is listed but in no shard" for tensor in weight_map if tensor not in self._owner]
        problems += [f"{tensor} is in {file.path.name} but not listed" for tensor, file in self._owner.items() if tensor not in weight_map]
        problems += [
            f"{tensor} is in {self._owner[tensor].path.name}, listed in {name}"
            for tensor, name in weight_map.items()
            if tensor in self._owner and self._owner[tensor].path.name != name
        ]
        if problems:
            listed = "; ".join(shortened(problems))
            raise CheckpointError(f"{self._format.index_name} and the shards disagree: {listed}")


def sorted_by_place(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return names in the order in which their data lie."""
    return sorted(specs, key=lambda name: specs[name].start)


def write_tensors(
    folder: Path, specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterator[tuple[str, Tensor]], *, max_shard_bytes: int
) -> None:
    """Write tensors as they come into model.safetensors, or shards with an index where they exceed max_shard_bytes.

    specs fixes names, dtypes, shapes and order; tensors must yield exactly these, each whole or in flat pieces one after another.
    Raises: CheckpointError when they differ.
    """
    shards = _plan_shards(specs, max_shard_bytes)
    names = [_SINGLE_NAME] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, {tensor: specs[tensor] for tensor in shard}, tensors)
    if next(tensors, None) is not None:
        raise CheckpointError("more tensors came than were announced")
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_num_bytes(*spec) for spec in specs.values())
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _plan_shards(specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = _num_bytes(*spec)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_file(path: Path, specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write the next of the tensors, which must be those of specs, into one file. Raises: CheckpointError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = _num_bytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in specs.items():
            for piece in _pieces(name, dtype, tuple(shape), tensors):
                file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _pieces(name: str, dtype: torch.dtype, shape: tuple[int, ...], tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Take one tensor's values: the tensor itself, or flat pieces until it is full."""
    missing, is_begun = math.prod(shape), False
    while missing or not is_begun:
        got, piece = next(tensors, ("nothing", None))
        fits = piece is not None and (piece.shape == shape or (piece.dim() == 1 and piece.numel() <= missing))
        if piece is None or got != name or piece.dtype != dtype or not fits:
            raise CheckpointError(f"expected tensor {name!r} {dtype} {list(shape)}, got {got!r}")
        yield piece
        missing, is_begun = missing - piece.numel(), True


def _num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def open_file(path: Path) -> int:
    """Open a regular file for reading; the caller closes the descriptor. Raises: CheckpointError."""
    try:
        # A pipe would block the opening for ever; O_NONBLOCK changes nothing for files.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file")
    return descriptor


def read_into(view: memoryview, path: Path, descriptor: int, start: int) -> None:
    """Fill memory from an open file, from byte start on. Raises: CheckpointError when the disk fails or the file is too short."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{path} ended at byte {start + done}; it changed while it was read")
        done += count


def _read_header(path: Path, descriptor: int) -> dict[str, TensorSpec]:
    size = os.fstat(descriptor).st_size
    prefix = bytearray(min(8, size))
    read_into(memoryview(prefix), path, descriptor, 0)
    length = int.from_bytes(prefix, "little")
    if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path} is not a safetensors file: its header of {length} bytes does not fit (file has {size})")
    text = bytearray(length)
    read_into(memoryview(text), path, descriptor, 8)
    values = _parse_json(text, path)
    values.pop("__metadata__", None)
    specs = {name: _read_spec(name, entry, 8 + length, path) for name, entry in values.items()}
    end = 8 + length
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].stop)):
        if spec.start != end:
            raise CheckpointError(f"{path}: tensor {name!r} starts at byte {spec.start}, expected {end}; tensors overlap or leave a hole")
        end = spec.stop
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes but its tensors end at {end}; the file is truncated or has a tail")
    return specs


def _read_spec(name: str, entry: Any, base: int, path: Path) -> TensorSpec:
    try:
        dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, stop)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} has an unreadable entry {str(entry)[:200]}") from error
    # Sizes are bounded before they are multiplied: a lying header may hold numbers of thousands of digits.
    if len(numbers) > _MAX_DIMENSIONS + 2 or any(type(value) is not int or not 0 <= value < _MAX_BYTES for value in numbers):
        raise CheckpointError(f"{path}: tensor {name!r} has an impossible shape or offset in {str(entry)[:200]}")
    if stop - start != _num_bytes(dtype, shape) or math.prod(value for value in shape if value) >= _MAX_BYTES:
        raise CheckpointError(f"{path}: tensor {name!r} says {entry['dtype']} {shape} but occupies bytes {start} to {stop}")
    return TensorSpec(dtype, tuple(shape), base + start, base + stop)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    return weight_map


def _parse_json(data: bytes | bytearray, path: Path) -> dict[str, Any]:
    try:
        return parse_json(data.decode("utf-8"), f"the header of {path}")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header of {path} is not UTF-8") from error


def _without_weights(folder: Path, format: WeightFormat) -> str:
    what = f"{folder} has neither {format.single_name} nor {format.index_name}"
    if format is SAFETENSORS and any(folder.glob("*.bin")):
        return (
            f"{what}, only pickle weights (.bin): these can run code when they are opened carelessly; use a version with safetensors, "
            "or, where you trust their origin, set allow_pickle, which reads tensors and refuses all else"
        )
    return what
