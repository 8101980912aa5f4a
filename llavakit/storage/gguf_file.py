"""GGUF files: their metadata, and their tensors read by offset.

Owns: the header (parsed here, with limits), GgufFile, KINDS. Packed tensors are unpacked by the gguf library, an optional extra.
Refuses: big-endian files, version 1, kinds of tensors other than KINDS.
Invariants: no file is mapped, so memory holds the header and the tensor that was asked for; a header that lies about counts,
lengths, shapes or offsets is a CheckpointError before any data is read; tensors lie one after the other, as llama.cpp demands.
Source: docs/gguf.md of ggml, gguf.cpp of llama.cpp.
"""

from __future__ import annotations

import array
import contextlib
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from llavakit.errors import CheckpointError
from llavakit.storage.tensors import FilePlace, TensorSpec, open_file, read_into, sorted_by_place

__all__ = ["KINDS", "GgufFile", "GgufKind", "GgufValue", "gguf_library"]

_T = TypeVar("_T", str, int, float, bool)
GgufValue: TypeAlias = "str | int | float | bool | list[str] | array.array[int] | array.array[float]"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_MAX_ITEMS = 1 << 22
_MAX_DIMENSIONS = 4
_MAX_BYTES = 1 << 62
_MAX_ALIGNMENT = 1 << 16
_UNPACKED_AT_ONCE = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SINGLE = 6


@dataclass(frozen=True, slots=True)
class GgufKind:
    """How the numbers of a tensor are stored."""

    name: str
    index: int
    """In the file."""
    block: int
    """Numbers that are packed together, of one row."""
    block_bytes: int
    dtype: torch.dtype
    """Of a weight where the caller asks for none."""

    @property
    def is_packed(self) -> bool:
        """Whether the gguf library has to unpack it, to float32."""
        return self.block > 1


_PACKED = (
    ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210),
    ("IQ4_NL", 20, 32, 18), ("IQ4_XS", 23, 256, 136),
)  # fmt: skip
KINDS: Mapping[int, GgufKind] = {
    kind.index: kind
    for kind in (
        GgufKind("F32", 0, 1, 4, torch.float32),
        GgufKind("F16", 1, 1, 2, torch.float16),
        GgufKind("BF16", 30, 1, 2, torch.bfloat16),
        *(GgufKind(*packed, torch.float16) for packed in _PACKED),
    )
}
"""The kinds that are read, by their index in files."""


class GgufFile:
    """One GGUF file, opened once and read by offset."""

    def __init__(self, path: Path) -> None:
        """Open it and read its header. Raises: CheckpointError naming the file and what is wrong with it."""
        self.path = path
        self._descriptor = open_file(path)
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            header = _Header(path, self._descriptor)
            num_tensors, num_values = header.counts()
            self.metadata: Mapping[str, GgufValue] = header.values(num_values)
            self.kinds, self.specs = header.tensors(num_tensors, self._alignment())
            opened.pop_all()

    def value(self, key: str, kind: type[_T]) -> _T | None:
        """Look up a value, None where there is none. Raises: CheckpointError for one of another type."""
        found = self.metadata.get(key)
        if found is None or type(found) is kind:
            return found
        raise CheckpointError(f"{self.path} states {key}={str(found)[:100]}; expected {kind.__name__}")

    def stated(self, key: str, kind: type[_T]) -> _T:
        """Look up a value that has to be there. Raises: CheckpointError."""
        found = self.value(key, kind)
        if found is None:
            raise CheckpointError(f"{self.path} does not state {key}")
        return found

    def texts(self, key: str) -> list[str]:
        """Look up a list of texts, empty where there is none. Raises: CheckpointError for another value."""
        found = self.metadata.get(key, [])
        if not isinstance(found, list):
            raise CheckpointError(f"{self.path} states {key}={str(found)[:100]}; expected a list of texts")
        return found

    def integers(self, key: str) -> list[int]:
        """Look up a list of integers, empty where there is none. Raises: CheckpointError for another value."""
        return [int(number) for number in self._array(key, "integers", "BbHhIiQq")]

    def numbers(self, key: str) -> list[float]:
        """Look up a list of numbers, empty where there is none. Raises: CheckpointError for another value."""
        return [_shortest(number) for number in self._array(key, "numbers", "f")]

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype, a packed one as float32. Raises: CheckpointError when the disk fails."""
        spec, kind = self.specs[name], self.kinds[name]
        if kind.is_packed:
            return self._unpack(spec, kind)
        return self._place(spec).read(spec.num_bytes).view(spec.dtype).view(spec.shape)

    def place(self, name: str) -> FilePlace | None:
        """Return where the bytes of a tensor that is not packed lie."""
        return None if self.kinds[name].is_packed else self._place(self.specs[name])

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order of their data."""
        return iter(sorted_by_place(self.specs))

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        os.close(self._descriptor)

    def _place(self, spec: TensorSpec) -> FilePlace:
        return FilePlace(self.path, self._descriptor, spec.start)

    def _array(self, key: str, kind: str, codes: str) -> Iterable[float]:
        found = self.metadata.get(key, array.array(codes[0]))
        if not isinstance(found, array.array) or found.typecode not in codes:
            raise CheckpointError(f"{self.path} states {key}={str(found)[:100]}; expected a list of {kind}")
        return found

    def _unpack(self, spec: TensorSpec, kind: GgufKind) -> Tensor:
        """Unpack some rows at a time, so that the library's copies stay small."""
        quants = gguf_library().quants
        packing = gguf_library().GGMLQuantizationType(kind.index)
        columns = spec.shape[-1]
        row_bytes = columns // kind.block * kind.block_bytes
        tensor = torch.empty(spec.shape)
        rows = tensor.view(-1, columns)
        step = max(1, _UNPACKED_AT_ONCE // columns)
        for first in range(0, len(rows), step):
            packed = np.empty((len(rows[first : first + step]), row_bytes), dtype=np.uint8)
            read_into(packed.reshape(-1).data, self.path, self._descriptor, spec.start + first * row_bytes)
            with np.errstate(all="ignore"):  # damaged scales make NaN, which the loader refuses
                rows[first : first + step] = torch.from_numpy(quants.dequantize(packed, packing))
        return tensor

    def _alignment(self) -> int:
        alignment = self.value("general.alignment", int)
        if alignment is None:
            return 32
        if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path} states general.alignment={alignment}; expected a power of two up to {_MAX_ALIGNMENT}")
        return alignment


def gguf_library() -> ModuleType:
    """Import the gguf library. Raises: CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("this needs the gguf library: pip install 'llavakit[gguf]'") from error
    return gguf


class _Header:
    """The beginning of a file, read as far as it is needed."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._size = os.fstat(descriptor).st_size
        self._limit = min(self._size, _MAX_HEADER_BYTES)
        self._data = bytearray()
        self._place = 0

    def counts(self) -> tuple[int, int]:
        """Read what every file begins with, and return the numbers of its tensors and values."""
        if self._size < len(_MAGIC) or self._take(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file")
        version = self._integer("I")
        if version not in _VERSIONS:
            kind = "big-endian, which is not read" if version & 0xFFFF == 0 else f"of version {version}; 2 and 3 are read"
            raise CheckpointError(f"{self._path} is a GGUF file, but {kind}")
        return self._integer("Q"), self._integer("Q")

    def values(self, count: int) -> dict[str, GgufValue]:
        """Read the metadata."""
        values: dict[str, GgufValue] = {}
        for _ in range(count):
            key = self._text()
            if key in values:
                raise CheckpointError(f"{self._path} states {key[:100]!r} twice")
            values[key] = self._value(self._integer("I"), key)
        return values

    def tensors(self, count: int, alignment: int) -> tuple[dict[str, GgufKind], dict[str, TensorSpec]]:
        """Read the list of tensors, and check where they lie."""
        kinds: dict[str, GgufKind] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        offsets: dict[str, int] = {}
        for _ in range(count):
            name = self._text()
            if name in kinds:
                raise CheckpointError(f"{self._path} has the tensor {name[:100]!r} twice")
            shapes[name] = self._shape(name)
            kinds[name] = self._kind(name, shapes[name][-1])
            offsets[name] = self._integer("Q")
        end = start = _aligned(self._place, alignment)
        specs = {}
        for name in sorted(offsets, key=lambda name: offsets[name]):
            first = _aligned(end, alignment)
            if start + offsets[name] != first:
                got = start + offsets[name]
                raise CheckpointError(f"{self._path}: tensor {name!r} starts at byte {got}, not {first}; tensors overlap or leave a hole")
            end = first + math.prod(shapes[name]) // kinds[name].block * kinds[name].block_bytes
            specs[name] = TensorSpec(kinds[name].dtype, shapes[name], first, end)
        if (specs and end > self._size) or _aligned(end, alignment) < self._size:
            raise CheckpointError(f"{self._path} has {self._size} bytes but its tensors end at {end}; the file is truncated or has a tail")
        return kinds, specs

    def _shape(self, name: str) -> tuple[int, ...]:
        num_dimensions = self._integer("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: tensor {name!r} has {num_dimensions} dimensions; from 1 to {_MAX_DIMENSIONS} are read")
        shape = tuple(self._integer("Q") for _ in range(num_dimensions))[::-1]
        if any(not 0 < length < _MAX_BYTES for length in shape) or math.prod(shape) * 4 >= _MAX_BYTES:
            raise CheckpointError(f"{self._path}: tensor {name!r} has the impossible shape {list(shape)}")
        return shape

    def _kind(self, name: str, columns: int) -> GgufKind:
        index = self._integer("I")
        kind = KINDS.get(index)
        if kind is None:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise CheckpointError(f"{self._path}: tensor {name!r} is of the kind {index}, which is not read; {known} are")
        if columns % kind.block:
            raise CheckpointError(f"{self._path}: tensor {name!r} has rows of {columns}, which {kind.name} cannot pack")
        return kind

    def _value(self, kind: int, key: str) -> GgufValue:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path} has a value of the unknown type {kind} for {key[:100]!r}")
        (value,) = struct.unpack(f"<{_SCALARS[kind]}", self._take(struct.calcsize(_SCALARS[kind])))
        return _shortest(value) if kind == _SINGLE else value

    def _array(self, key: str) -> GgufValue:
        kind, count = self._integer("I"), self._integer("Q")
        if count > _MAX_ITEMS or kind not in (*_SCALARS, _STRING):
            raise CheckpointError(f"{self._path} has {count} items of type {kind} for {key[:100]!r}, which are not read")
        if kind == _STRING:
            return [self._text() for _ in range(count)]
        code = _SCALARS[kind].replace("?", "B")
        items: array.array[int] | array.array[float] = array.array(code)
        items.frombytes(self._take(count * struct.calcsize(f"<{code}")))
        if sys.byteorder == "big":
            items.byteswap()
        return items

    def _text(self) -> str:
        data = self._take(self._integer("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._path} has a text that is not UTF-8 before byte {self._place}") from error

    def _integer(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return int(value)

    def _take(self, count: int) -> bytes:
        """Return the next bytes. Raises: CheckpointError where the file, or the patience, ends before."""
        stop = self._place + count
        if stop > self._limit:
            raise CheckpointError(
                f"{self._path}: the header asks for {count} bytes at byte {self._place}, of at most {self._limit}; "
                "the file is truncated or damaged"
            )
        if stop > len(self._data):
            more = bytearray(min(max(stop - len(self._data), _CHUNK_BYTES), self._limit - len(self._data)))
            read_into(memoryview(more), self._path, self._descriptor, len(self._data))
            self._data += more
        data = bytes(self._data[self._place : stop])
        self._place = stop
        return data


def _aligned(place: int, alignment: int) -> int:
    return place + -place % alignment


def _shortest(number: float) -> float:
    """Return a float32 as the decimal number that was meant: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(number)))
