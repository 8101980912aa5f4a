"""storage.tensors: what is written is read back bit by bit; what lies about itself is refused before any data is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llavakit.errors import CheckpointError
from llavakit.storage.tensors import INDEX_NAME, TensorFile, TensorFolder, write_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    return {**tensors, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 6).T}


def save(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int = 1 << 40) -> None:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(folder, specs, iter(tensors.items()), max_shard_bytes=max_shard_bytes)


def read_all(folder: Path) -> dict[str, Tensor]:
    with TensorFolder(folder) as opened:
        return {name: opened.read(name) for name in opened.in_file_order()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def write_raw(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("max_shard_bytes", [1 << 40, 100, 1])
def test_round_trip_is_bit_exact(tmp_path: Path, max_shard_bytes: int) -> None:
    save(tmp_path, some_tensors(), max_shard_bytes=max_shard_bytes)
    assert_equal(read_all(tmp_path), some_tensors())


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    save(tmp_path, some_tensors())
    assert_equal(safetensors.torch.load_file(tmp_path / "model.safetensors"), some_tensors())


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(read_all(tmp_path), tensors)


def test_shards_stay_below_the_limit_and_are_indexed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    save(tmp_path, tensors, max_shard_bytes=80)
    index = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 200}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"


def test_writer_refuses_other_tensors_than_announced(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    for tensors in ({"a": torch.ones(2)}, {"a": torch.ones(2), "c": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3)}):
        with pytest.raises(CheckpointError, match="expected tensor 'b'"):
            write_tensors(tmp_path, specs, iter(tensors.items()), max_shard_bytes=100)
    three = [("a", torch.ones(2)), ("b", torch.ones(2)), ("c", torch.ones(2))]
    with pytest.raises(CheckpointError, match="more tensors"):
        write_tensors(tmp_path, specs, iter(three), max_shard_bytes=100)


LIES = {
    "shape too long": {"t": entry(shape=[3])},
    "shape too short": {"t": entry(shape=[1])},
    "negative shape": {"t": entry(shape=[-2])},
    "two negatives": {"t": entry(shape=[-1, -2])},
    "fractional shape": {"t": entry(shape=[2.0])},
    "boolean shape": {"t": entry(shape=[True, 2])},
    "text as shape": {"t": entry(shape="2")},
    "no shape": {"t": entry(shape=None)},
    "too many dimensions": {"t": entry(shape=[1] * 100 + [2])},
    "overflowing shape": {"t": entry(shape=[1 << 62, 1 << 62, 0], offsets=[0, 0]), "u": entry()},
    "huge digits": {"t": entry(shape=[10**4000, 10**4000])},
    "unknown dtype": {"t": entry(dtype="F128")},
    "list as dtype": {"t": entry(dtype=["F32"])},
    "negative offset": {"t": entry(offsets=[-8, 0])},
    "reversed offsets": {"t": entry(offsets=[8, 0])},
    "one offset": {"t": entry(offsets=[8])},
    "beyond the file": {"t": entry(shape=[4], offsets=[0, 16])},
    "hole before": {"t": entry(shape=[1], offsets=[4, 8])},
    "tail after": {"t": entry(shape=[1], offsets=[0, 4])},
    "overlap": {"t": entry(), "u": entry(shape=[1], offsets=[4, 8])},
    "same place": {"t": entry(), "u": entry()},
    "no entry": {"t": None},
    "nothing in it": {},
    "list": [1, 2],
    "not JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "duplicate key": b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "duplicate field": b'{"t":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES.keys())
def test_lying_headers_are_refused(tmp_path: Path, header: object) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        TensorFile(tmp_path / "model.safetensors")


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    save(tmp_path, some_tensors())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for part in range(64):
        path.write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            TensorFile(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="tail"):
        TensorFile(path)


@pytest.mark.parametrize("length", [1 << 24, (1 << 24) + 1, (1 << 63) - 1, (1 << 64) - 1])
def test_huge_header_lengths_are_refused_without_reading(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header"):
        TensorFile(path)


def test_refused_files_are_closed(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"t": entry(shape=[9])}, bytes(8))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(5):
        with pytest.raises(CheckpointError):
            TensorFolder(tmp_path)
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(100)})
    file = TensorFile(tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        file.read("t")
    file.close()


def test_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        TensorFile(tmp_path / "a.safetensors")


def test_folder_without_weights_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json$"):
        TensorFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        CheckpointError, match=r"only pickle weights \(\.bin\): these can run code .* a version with safetensors, .* set allow_pickle"
    ):
        TensorFolder(tmp_path)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "a\0.safetensors", "http://x/a.safetensors", "", "..", 7]
)
def test_index_leading_outside_is_refused(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "out.safetensors", folder / "sub" / "a.safetensors"):
        write_raw(path, {"t": entry()}, bytes(8))
    write_index(folder, {"t": name})
    with pytest.raises(CheckpointError, match=r"plain file name|weight_map"):
        TensorFolder(folder)


def test_link_leading_outside_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_raw(tmp_path / "out.safetensors", {"t": entry()}, bytes(8))
    (folder / "model.safetensors").symlink_to(tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="leads outside"):
        TensorFolder(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_raw(blobs / "beef", {"t": entry()}, bytes(8))
    (snapshot / "model.safetensors").symlink_to(Path("..") / ".." / "blobs" / "beef")
    assert torch.equal(read_all(snapshot)["t"], torch.zeros(2))


def test_index_and_shards_must_agree_and_all_disagreements_are_listed(tmp_path: Path) -> None:
    for shard, names in {"a": ("x", "moved"), "b": ("y", "unlisted")}.items():
        header = {name: entry(offsets=[8 * i, 8 * i + 8]) for i, name in enumerate(names)}
        write_raw(tmp_path / f"{shard}.safetensors", header, bytes(16))
    write_index(tmp_path, {"x": "a.safetensors", "moved": "b.safetensors", "y": "b.safetensors", "gone": "a.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(tmp_path)
    for text in ("gone is listed but in no shard", "unlisted is in b.safetensors but not listed", "moved is in a.safetensors, listed in b"):
        assert text in str(caught.value)


def test_missing_shard_and_tensor_in_two_shards(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", {"x": entry()}, bytes(8))
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"cannot read .*b\.safetensors"):
        TensorFolder(tmp_path)
    write_raw(tmp_path / "b.safetensors", {"x": entry()}, bytes(8))
    with pytest.raises(CheckpointError, match="each may be in one file only"):
        TensorFolder(tmp_path)


def test_duplicate_keys_of_the_index_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", {"x": entry()}, bytes(8))
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="'x' twice"):
        TensorFolder(tmp_path)


def test_one_file_counts_before_an_index(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(2)})
    write_index(tmp_path, {"y": "gone.safetensors"})
    assert set(read_all(tmp_path)) == {"x"}


def test_tensors_may_come_in_flat_pieces(tmp_path: Path) -> None:
    table, nothing = torch.arange(12.0).view(3, 4), torch.empty(0, 4)
    specs = {"table": (torch.float32, (3, 4)), "nothing": (torch.float32, (0, 4))}
    pieces = [("table", piece) for piece in table.reshape(-1).split(5)]
    write_tensors(tmp_path, specs, iter([*pieces, ("nothing", nothing)]), max_shard_bytes=10**6)
    with TensorFolder(tmp_path) as files:
        assert torch.equal(files.read("table"), table)
        assert files.read("nothing").shape == (0, 4)


@pytest.mark.parametrize(
    "pieces",
    [
        [("a", torch.zeros(5))],
        [("a", torch.zeros(5)), ("a", torch.zeros(8))],
        [("a", torch.zeros(5)), ("b", torch.zeros(7))],
        [("a", torch.zeros(4, 3))],
        [("a", torch.zeros(12, dtype=torch.float16))],
        [("a", torch.zeros(12)), ("a", torch.zeros(1))],
    ],
)
def test_pieces_must_make_the_tensor(tmp_path: Path, pieces: list[tuple[str, torch.Tensor]]) -> None:
    with pytest.raises(CheckpointError, match=r"expected tensor 'a'|more tensors came"):
        write_tensors(tmp_path, {"a": (torch.float32, (3, 4))}, iter(pieces), max_shard_bytes=10**6)
