"""storage.pickle_tensors: tensors of torch.save files come as stored, code in them never runs, damage is one error."""

from __future__ import annotations

import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llavakit.errors import CheckpointError
from llavakit.storage.pickle_tensors import PICKLE, PickleFile
from llavakit.storage.tensors import TensorFolder

NAME = "pytorch_model.bin"


def some_tensors() -> dict[str, Tensor]:
    table = torch.arange(40.0).reshape(10, 4)
    return {
        "embedding": table,
        "head": table,
        "part": table[2:4],
        "turned": torch.arange(24.0).half().reshape(6, 4).t(),
        "parameter": nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }


def read_all(folder: Path) -> dict[str, Tensor]:
    with TensorFolder(folder, PICKLE) as tensors:
        return {name: tensors.read(name) for name in tensors.in_file_order()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_come_as_stored_in_memory_of_their_own(tmp_path: Path, is_zip: bool) -> None:
    torch.save(some_tensors(), tmp_path / NAME, _use_new_zipfile_serialization=is_zip)
    found = read_all(tmp_path)
    assert_equal(found, some_tensors())
    assert found["embedding"].data_ptr() != found["head"].data_ptr()
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())
    assert found["part"].untyped_storage().nbytes() == 32


def test_specs_tell_dtype_shape_and_size_without_reading(tmp_path: Path) -> None:
    torch.save(some_tensors(), tmp_path / NAME)
    with TensorFolder(tmp_path, PICKLE) as tensors:
        spec = tensors.specs["turned"]
    assert (spec.dtype, spec.shape, spec.num_bytes) == (torch.float16, (4, 6), 48)


def test_new_files_are_mapped(tmp_path: Path) -> None:
    torch.save({"big": torch.zeros(4 << 20)}, tmp_path / NAME)
    file = PickleFile(tmp_path / NAME)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(tmp_path / NAME) in maps
    file.close()


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> None:
    for name, tensors in shards.items():
        torch.save(tensors, folder / name)
    listed = {tensor: name for name, tensors in shards.items() for tensor in tensors} if weight_map is None else weight_map
    (folder / f"{NAME}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}), encoding="utf-8")


def test_shards_with_an_index(tmp_path: Path) -> None:
    tensors = some_tensors()
    names = list(tensors)
    write_shards(tmp_path, {f"pytorch_model-{i}.bin": {name: tensors[name] for name in names[i::2]} for i in range(2)})
    assert_equal(read_all(tmp_path), tensors)


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "x.safetensors", "a/x.bin", ""])
def test_index_leading_outside_is_refused(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, {}, {"t": name})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\.index\.json names the file .* ending in \.bin was expected"):
        read_all(tmp_path)


def test_links_leading_outside_and_disagreeing_shards_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(some_tensors(), tmp_path / "out.bin")
    (folder / NAME).symlink_to(tmp_path / "out.bin")
    with pytest.raises(CheckpointError, match="leads outside"):
        read_all(folder)
    (folder / NAME).unlink()
    write_shards(folder, {"a.bin": {"x": torch.ones(1)}}, {"x": "a.bin", "y": "a.bin"})
    with pytest.raises(CheckpointError, match="y is listed but in no shard"):
        read_all(folder)
    write_shards(folder, {"a.bin": {"x": torch.ones(1)}}, {"x": "a.bin", "y": "b.bin"})
    with pytest.raises(CheckpointError, match=r"b\.bin: it is missing"):
        read_all(folder)


class Payload:
    """Pickled, it is the call of a function."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_does_not_run(tmp_path: Path, is_zip: bool) -> None:
    torch.save({"x": torch.ones(1), "y": Payload(tmp_path / "ran")}, tmp_path / NAME, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="holds something else than tensors"):
        read_all(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"x": {"y": torch.ones(1)}}, "'x', a dict"),
        ({"x": torch.ones(1), "epoch": 3}, "'epoch', a int"),
        ({3: torch.ones(1)}, "'3', a tensor"),
        ({"x": torch.eye(2).to_sparse()}, "'x', a sparse, quantised, nested or empty Tensor"),
        ({"x": torch.ones(2, device="meta")}, "'x', a sparse, quantised, nested or empty Tensor"),
        ({"x": torch.ones(2).to(torch.float8_e4m3fn)}, "'x', a tensor of torch.float8_e4m3fn"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "'x', a tensor of torch.complex64"),
        ({"x": torch.ones(1).expand(1 << 17, 1 << 17)}, "68719476736 bytes of which 4 are stored"),
    ],
)
def test_only_a_table_of_plain_tensors_is_read(tmp_path: Path, value: object, told: str) -> None:
    torch.save(value, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=told):
        read_all(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of its prototypes
def test_nested_and_quantised_tensors_are_refused(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for value in (nested, torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)):
        torch.save({"x": value}, tmp_path / NAME)
        with pytest.raises(CheckpointError, match=r"'x', a sparse, quantised, nested|is damaged, or holds something else"):
            read_all(tmp_path)


def test_other_files_of_that_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="is damaged, or holds something else"):
        PickleFile(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="is damaged, or holds something else"):
        PickleFile(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        PickleFile(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="no regular file"):
        PickleFile(path)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / NAME, "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="compressed archive"):
        PickleFile(tmp_path / NAME)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_zip", [True, False])
def test_damage_is_an_error_or_harmless(tmp_path: Path, is_zip: bool) -> None:
    torch.save(some_tensors(), tmp_path / "good.bin", _use_new_zipfile_serialization=is_zip)
    good, draw = (tmp_path / "good.bin").read_bytes(), random.Random(3)
    refused = 0
    for _ in range(150):
        data = bytearray(good[: draw.choice([len(good), draw.randrange(len(good))])])
        for _ in range(draw.choice([0, 1, 4])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / NAME).write_bytes(data)
        try:
            read_all(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 50
