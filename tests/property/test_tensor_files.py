"""Properties of storage.tensors: any tensors round-trip; any damage to a header is refused or changes nothing that is read."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llavakit.errors import CheckpointError
from llavakit.storage.tensors import TensorFile, TensorFolder, write_tensors

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    specs = draw(st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), min_size=1, max_size=6))
    return {name: torch.randint(0, 100, shape).to(dtype) for name, (dtype, shape) in specs.items()}


def save(folder: Path, named: dict[str, Tensor], *, max_shard_bytes: int) -> None:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
    write_tensors(folder, specs, iter(named.items()), max_shard_bytes=max_shard_bytes)


@settings(max_examples=25, deadline=None)
@given(named=tensors(), max_shard_bytes=st.integers(1, 400))
def test_any_tensors_round_trip(named: dict[str, Tensor], max_shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), named, max_shard_bytes=max_shard_bytes)
        with TensorFolder(Path(folder)) as opened:
            found = {name: opened.read(name) for name in opened.in_file_order()}
    assert set(found) == set(named)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in named.items())


@settings(max_examples=60, deadline=None)
@given(named=tensors(), place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_files_raise_our_error_or_stay_inside_the_file(named: dict[str, Tensor], place: float, value: int, *, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), named, max_shard_bytes=1 << 40)
        path = Path(folder) / "model.safetensors"
        data = bytearray(path.read_bytes())
        position = int(place * len(data))
        if cut:
            del data[position:]
        else:
            data[position] = value
        path.write_bytes(data)
        try:
            file = TensorFile(path)
        except CheckpointError:
            return
        spans = sorted((spec.start, spec.stop) for spec in file.specs.values())
        assert spans[-1][1] == len(data)
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(spans))
        assert sum(file.read(name).nbytes for name in file.specs) == sum(stop - start for start, stop in spans)
        file.close()
