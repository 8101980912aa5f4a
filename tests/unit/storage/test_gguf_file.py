"""GGUF headers and data: equal to the gguf library's own reading; every lie is one CheckpointError that names the file."""

import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from llavakit.errors import CheckpointError
from llavakit.storage.gguf_file import KINDS, GgufFile, GgufKind

PACKED = [kind for kind in KINDS.values() if kind.is_packed]


def write(path: Path, *, num_values: int = 2) -> Path:
    """Write two tensors and some values of every type."""
    writer = gguf.GGUFWriter(path, "llama")
    for index in range(num_values):
        writer.add_string(f"text.{index}", "ä b")
    writer.add_float32("eps", 1e-5)
    writer.add_uint64("long", 1 << 40)
    writer.add_bool("yes", True)
    writer.add_array("words", ["a", "▁b", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("fractions", [0.5, 1e-5])
    writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed_bytes(kind: int, rows: int, columns: int) -> np.ndarray:
    """Draw blocks whose scales are finite whichever bytes they are."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    rng = np.random.default_rng(kind)
    return rng.integers(0, 256, (rows, columns // block * size), dtype=np.uint8) & np.uint8(0x3F)


def opened(path: Path) -> GgufFile:
    file = GgufFile(path)
    file.close()
    return file


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_packed_kinds_are_what_the_library_makes_of_them(tmp_path: Path, kind: GgufKind) -> None:
    packing = gguf.GGMLQuantizationType(kind.index)
    assert (kind.block, kind.block_bytes, kind.name) == (*gguf.GGML_QUANT_SIZES[packing], packing.name)
    data = packed_bytes(kind.index, 7, 512)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    read = file.read("w")
    file.close()
    assert read.shape == (7, 512)
    assert torch.equal(read, torch.from_numpy(gguf.quants.dequantize(data, packing)))


def test_what_llama_quantize_falls_back_to_is_read() -> None:
    assert {"IQ4_NL", "IQ4_XS"} <= {kind.name for kind in PACKED}  # of Q2_K and Q3_K, where rows are no multiple of 256


def test_rows_are_unpacked_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavakit.storage.gguf_file._UNPACKED_AT_ONCE", 64)
    test_packed_kinds_are_what_the_library_makes_of_them(tmp_path, KINDS[8])


def test_values_and_places_are_the_librarys(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    file, reader = opened(path), gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: value for name, value in file.metadata.items() if isinstance(value, str | bool)} == {
        name: value for name, value in theirs.items() if isinstance(value, str | bool)
    }
    assert (file.value("long", int), file.value("eps", float)) == (1 << 40, 1e-5)
    assert file.texts("words") == theirs["words"]
    assert file.integers("numbers") == theirs["numbers"]
    assert file.numbers("fractions") == [0.5, 1e-5]
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {name: spec.start for name, spec in file.specs.items()}


def test_a_value_of_another_type_is_refused(tmp_path: Path) -> None:
    file = opened(write(tmp_path / "x.gguf"))
    with pytest.raises(CheckpointError, match=r"states eps=1e-05; expected int"):
        file.value("eps", int)
    with pytest.raises(CheckpointError, match=r"expected a list of texts"):
        file.texts("numbers")
    with pytest.raises(CheckpointError, match=r"expected a list of integers"):
        file.integers("fractions")
    with pytest.raises(CheckpointError, match=r"expected a list of numbers"):
        file.numbers("words")
    with pytest.raises(CheckpointError, match=r"does not state nothing"):
        file.stated("nothing", int)


def test_without_the_library_packed_tensors_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", packed_bytes(8, 1, 32), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setitem(sys.modules, "gguf", None)
    file = GgufFile(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"pip install 'llavakit\[gguf\]'"):
        file.read("w")
    file.close()


def header(*values: bytes, num_tensors: int = 0, num_values: int | None = None, version: int = 3) -> bytes:
    count = len(values) if num_values is None else num_values
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, count) + b"".join(values)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def padded(data: bytes, num_bytes: int) -> bytes:
    return data + bytes(-len(data) % 32 + num_bytes)


FAULTS: dict[str, tuple[bytes, str]] = {
    "no magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "version 1": (header(version=1), "of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more values than there are": (header(num_values=1 << 63), "truncated or damaged"),
    "more tensors than there are": (header(num_tensors=1 << 63), "truncated or damaged"),
    "a huge text": (header(struct.pack("<Q", 1 << 62)), "asks for 4611686018427387904 bytes"),
    "a huge list": (header(text("k") + struct.pack("<IIQ", 9, 0, 1 << 60)), "1152921504606846976 items"),
    "a long list": (header(text("k") + struct.pack("<IIQ", 9, 0, 1 << 22)), "truncated or damaged"),
    "lists in lists": (header(text("k") + struct.pack("<IIQ", 9, 9, 1)), "items of type 9"),
    "an unknown type": (header(text("k") + struct.pack("<I", 99)), "unknown type 99"),
    "a key twice": (header(*[text("k") + struct.pack("<IB", 7, 1)] * 2), "'k' twice"),
    "text that is none": (header(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 7, 1)), "not UTF-8"),
    "no alignment": (header(text("general.alignment") + struct.pack("<II", 4, 0)), "power of two"),
    "an odd alignment": (header(text("general.alignment") + struct.pack("<II", 4, 24)), "power of two"),
    "alignment as text": (header(text("general.alignment") + struct.pack("<I", 8) + text("32")), "expected int"),
    "a tensor twice": (padded(header(tensor("a", (8,)) * 2, num_tensors=2, num_values=0), 32), "'a' twice"),
    "no dimensions": (header(tensor("a", ()), num_tensors=1, num_values=0), "0 dimensions"),
    "many dimensions": (header(text("a") + struct.pack("<I", 1 << 31), num_tensors=1, num_values=0), "2147483648 dimensions"),
    "an impossible shape": (header(tensor("a", (1 << 40, 1 << 40)), num_tensors=1, num_values=0), "impossible shape"),
    "an empty shape": (header(tensor("a", (0, 3)), num_tensors=1, num_values=0), "impossible shape"),
    "a kind that is not read": (header(tensor("a", (256,), 16), num_tensors=1, num_values=0), "kind 16.* Q6_K"),
    "rows that are no blocks": (header(tensor("a", (33,), 8), num_tensors=1, num_values=0), "rows of 33"),
    "overlapping tensors": (padded(header(tensor("a", (8,)) + tensor("b", (8,)), num_tensors=2, num_values=0), 64), "overlap"),
    "a hole": (padded(header(tensor("a", (8,)) + tensor("b", (8,), 0, 64), num_tensors=2, num_values=0), 96), "leave a hole"),
    "data that is missing": (padded(header(tensor("a", (8,)), num_tensors=1, num_values=0), 31), "truncated"),
    "data that is far away": (padded(header(tensor("a", (8,), 0, 1 << 60), num_tensors=1, num_values=0), 32), "hole"),
    "a tail": (padded(header(tensor("a", (8,)), num_tensors=1, num_values=0), 96), "tail"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_header_that_lies_is_refused(tmp_path: Path, fault: str) -> None:
    data, message = FAULTS[fault]
    path = tmp_path / "lies.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"lies.gguf.*{message}"):
        GgufFile(path)


def test_an_unexpected_failure_closes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    path, before = write(tmp_path / "x.gguf"), os.listdir("/proc/self/fd")
    monkeypatch.setattr("llavakit.storage.gguf_file._Header.values", fail)
    with pytest.raises(MemoryError):
        GgufFile(path)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "x.gguf", num_values=1).read_bytes()
    data_end = opened(tmp_path / "x.gguf").specs["b"].stop
    for length in range(data_end):
        (tmp_path / "x.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            GgufFile(tmp_path / "x.gguf")


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def spliced(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.randint(1, 9)) + data[place + rng.randint(0, 9) :]


@pytest.mark.parametrize("change", [flipped, spliced])
def test_damage_is_an_error_or_reads(tmp_path: Path, change: Callable[[bytes, random.Random], bytes]) -> None:
    data, rng = write(tmp_path / "x.gguf").read_bytes(), random.Random(0)
    for _ in range(400):
        (tmp_path / "x.gguf").write_bytes(change(data, rng))
        try:
            file = GgufFile(tmp_path / "x.gguf")
        except CheckpointError:
            continue
        for name in file.specs:
            file.read(name)
        file.close()
