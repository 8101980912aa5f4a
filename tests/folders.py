"""Looking into checkpoint folders, and changing what their small files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llavakit.storage.tensors import TensorFolder

__all__ = ["assert_same", "edit_json", "tensors_of"]


def edit_json(path: Path, **values: object) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, in their own dtypes."""
    with TensorFolder(folder) as files:
        return {name: files.read(name) for name in files.specs}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Assert equal names, and equal values of each."""
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
