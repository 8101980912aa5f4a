"""The tensors of a checkpoint of any layout, opened part by part.

Owns: TensorSource, Part and open_parts: which files a model's weights lie in, and by which names. A LLaVA of the original layout may
leave its tower where it was published; then there are two parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from llavakit.checkpoint.detect import Kind, detect_kind
from llavakit.checkpoint.layouts import LLAMA, LLAMA_DECODER, LLAVA_HF, TOWER, original_layout
from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError
from llavakit.model.decoder import LlamaDecoder
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.storage.documents import read_optional_json
from llavakit.storage.hub import resolve_model
from llavakit.storage.pickle_tensors import PICKLE
from llavakit.storage.tensors import SAFETENSORS, TensorFolder, TensorSpec

__all__ = ["Part", "TensorSource", "open_parts", "tower_folder"]


class TensorSource(Protocol):
    """Named tensors that can be read one by one."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> dtype, shape and place."""

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype."""

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order that disks like."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a model's tensors, and what their names mean."""

    tensors: TensorSource
    layout: Layout

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: spec.shape for name, spec in self.tensors.specs.items()}


@contextlib.contextmanager
def open_parts(
    folder: Path, model: nn.Module, *, vision_tower: str | Path | None = None, allow_pickle: bool = False
) -> Iterator[tuple[Part, ...]]:
    """Open the files of a model's weights. Raises: CheckpointError.

    vision_tower is a folder or hub id in place of the one that an original LLaVA's config names; it is opened only where the folder
    itself holds no tower.
    """
    values = read_optional_json(folder / "config.json")
    is_original = bool(values) and detect_kind(values) is Kind.ORIGINAL
    layout = original_layout(model.config.projector_depth) if is_original and isinstance(model, LlavaCore) else _layout(model)
    with contextlib.ExitStack() as files:
        parts = [Part(files.enter_context(_open(folder, allow_pickle=allow_pickle)), layout)]
        if is_original and not any(name.startswith("model.vision_tower.") for name in parts[0].tensors.specs):
            tower = tower_folder(values, vision_tower, allow_pickle=allow_pickle)
            parts.append(Part(files.enter_context(_open(tower, allow_pickle=allow_pickle)), TOWER))
        yield tuple(parts)


def tower_folder(values: Mapping[str, Any], vision_tower: str | Path | None, *, allow_pickle: bool, weights: bool = True) -> Path:
    """Return the folder of an original LLaVA's tower: what the caller names, else what config.json does. Raises: CheckpointError."""
    name = vision_tower if vision_tower is not None else values.get("mm_vision_tower", values.get("vision_tower"))
    if not isinstance(name, str | Path) or not str(name):
        raise CheckpointError("config.json names no mm_vision_tower, and the folder holds none; say which tower it is")
    try:
        return resolve_model(name, parts="model" if weights else "processor", allow_pickle=allow_pickle)
    except CheckpointError as error:
        raise CheckpointError(f"the model's vision tower is not in its own folder: {error}; --vision-tower names a folder") from error


def _open(folder: Path, *, allow_pickle: bool) -> TensorFolder:
    is_pickle = allow_pickle and not SAFETENSORS.is_in(folder) and PICKLE.is_in(folder)
    return TensorFolder(folder, PICKLE if is_pickle else SAFETENSORS)


def _layout(model: nn.Module) -> Layout:
    match model:
        case LlavaCore():
            return LLAVA_HF
        case LlamaCore():
            return LLAMA
        case LlamaDecoder():
            return LLAMA_DECODER
    raise TypeError(f"no checkpoint layout is known for {type(model).__name__}")
