"""GGUF files as a checkpoint: which of them belong together, and their tensors in our order.

Owns: is_gguf, GgufModel and open_gguf (a language model, whole or in llama.cpp's splits, with the tower and projector of an
"mmproj" file), told apart by general.architecture; the parts of a model. Refuses: several models in one folder, other architectures.
Rows of Llama's queries and keys lie in Meta's order, those of the towers never do. llama.cpp applies a tower's last norm where a file
has one, so that files of LLaVA have none; no LLaVA uses it, and ours is then the identity.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llavakit.checkpoint.layouts import gguf_layout, gguf_tower_layout
from llavakit.checkpoint.rotary_order import to_halves
from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError
from llavakit.model.decoder import LlamaDecoder
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.storage.gguf_file import GgufFile
from llavakit.storage.hub import check_inside
from llavakit.storage.pickle_tensors import PICKLE
from llavakit.storage.tensors import SAFETENSORS, FilePlace, TensorSource, TensorSpec

__all__ = ["GgufModel", "is_gguf", "num_tower_layers", "open_gguf"]

_PAIRED, _HALVED = "llama", "qwen2"
"""The architectures that are read, by how the rotary embedding turns a head: neighbouring pairs, or the two halves as we do."""
_TOWER = "clip"
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")
_ROTARY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
_POST_NORM = ("v.post_ln.weight", "v.post_ln.bias")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The opened files of one model."""

    texts: tuple[GgufFile, ...]
    """The language model: one file, or its splits in their order, the first of which has the metadata."""
    tower: GgufFile | None
    """Tower and projector; None for a language model alone."""

    @property
    def text(self) -> GgufFile:
        """The file with the language model's metadata."""
        return self.texts[0]

    @property
    def architecture(self) -> str:
        """The language model's architecture."""
        return self.text.stated("general.architecture", str)

    @property
    def head_width(self) -> int:
        """Width of a head of the language model. Raises: CheckpointError."""
        width, num_heads = (self.text.stated(f"{self.architecture}.{key}", int) for key in ("embedding_length", "attention.head_count"))
        if num_heads < 1 or width < 1:
            raise CheckpointError(f"{self.text.path} states {num_heads} heads and a width of {width}")
        stated = self.text.value(f"{self.architecture}.attention.key_length", int)
        return width // num_heads if stated is None else stated

    @property
    def text_specs(self) -> dict[str, TensorSpec]:
        """All tensors of the language model."""
        return {name: spec for file in self.texts for name, spec in file.specs.items()}

    def parts(self, model: nn.Module) -> list[tuple[TensorSource, Layout]]:
        """Return what a model is filled from, and what the names there mean: those of the model's layers, however many the files name."""
        parts: list[tuple[TensorSource, Layout]] = [(_Text(self), _text_layout(model))]
        if self.tower is not None and isinstance(model, LlavaCore):
            num_layers, depth = model.config.vision_config.num_hidden_layers, model.config.projector_depth
            parts.append((_Tower(self.tower), gguf_tower_layout(num_layers, depth, is_swapped=_is_swapped(self.tower))))
        return parts


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with no other weights than such files."""
    return path.is_file() or (any(path.glob("*.gguf")) and not (SAFETENSORS.is_in(path) or PICKLE.is_in(path)))


@contextlib.contextmanager
def open_gguf(path: Path, tower: Path | None = None) -> Iterator[GgufModel]:
    """Open a file or a folder, and a tower in place of the folder's own. Raises: CheckpointError."""
    with contextlib.ExitStack() as files:
        found = [_open(file, files) for file in _files_of(path)]
        texts = [file for file in found if file.value("general.architecture", str) != _TOWER]
        towers = [file for file in found if file not in texts]
        if tower is not None:
            towers = [_open(file, files) for file in _files_of(tower)]
            towers = [file for file in towers if file.value("general.architecture", str) == _TOWER]
            if not towers:
                raise CheckpointError(f"{tower} holds no tower in a GGUF file (general.architecture clip)")
        if not texts:
            raise CheckpointError(f"{path} holds a tower but no language model; name the language model, and this as its vision tower")
        if len(towers) > 1:
            raise CheckpointError(f"{towers[0].path.parent} holds several towers ({_names(towers)}); name one with --vision-tower")
        yield GgufModel(_whole(path, texts), towers[0] if towers else None)


def num_tower_layers(tower: GgufFile) -> int:
    """Count the layers that a tower's file has, by names: what metadata states may be anything."""
    return len({name.removeprefix("v.blk.").partition(".")[0] for name in tower.specs if name.startswith("v.blk.")})


def _files_of(path: Path) -> list[Path]:
    """List the files of a folder, or a file with its other splits."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        for file in files:
            check_inside(file, path)
        return files
    split = _SPLIT.fullmatch(path.name)
    return [path] if split is None else sorted(path.parent.glob(f"{glob.escape(split[1])}-?????-of-?????.gguf"))


def _open(path: Path, files: contextlib.ExitStack) -> GgufFile:
    file = GgufFile(path)
    files.callback(file.close)
    return file


def _whole(path: Path, texts: Sequence[GgufFile]) -> tuple[GgufFile, ...]:
    """Check that files are one language model. Raises: CheckpointError."""
    counts = [file.value("split.count", int) or 1 for file in texts]
    numbers = [file.value("split.no", int) or 0 for file in texts]
    if len(texts) != counts[0] or sorted(numbers) != list(range(len(texts))) or len(set(counts)) > 1:
        hint = "expected one model, whole or with all of its splits; name one file instead of the folder"
        raise CheckpointError(f"{path} holds the language models or parts {_names(texts)}; {hint}")
    ordered = tuple(file for _, file in sorted(zip(numbers, texts, strict=True), key=lambda pair: pair[0]))
    names = [name for file in ordered for name in file.specs]
    stated = ordered[0].value("split.tensors.count", int)
    if len(set(names)) < len(names) or (stated is not None and stated != len(names)):
        raise CheckpointError(
            f"{path}: the splits {_names(ordered)} have {len(names)} tensors, {len(set(names))} names, and state {stated}"
        )
    architecture = ordered[0].stated("general.architecture", str)
    if architecture not in (_PAIRED, _HALVED):
        raise CheckpointError(f"{ordered[0].path} holds a model of the architecture {architecture!r}; {_PAIRED} and {_HALVED} are read")
    return ordered


def _names(files: Sequence[GgufFile]) -> str:
    return ", ".join(file.path.name for file in files)


def _is_swapped(tower: GgufFile) -> bool:
    """Whether the file has llama.cpp's first naming, by the rule of its loader."""
    spec = tower.specs.get("v.blk.0.ffn_down.weight")
    return spec is not None and spec.shape[-1] == tower.value("clip.vision.embedding_length", int)


def _text_layout(model: nn.Module) -> Layout:
    match model:
        case LlavaCore():
            return gguf_layout(model.text_config.num_hidden_layers, "language_model.model.", "language_model.lm_head.")
        case LlamaCore():
            return gguf_layout(model.text_config.num_hidden_layers, "model.", "lm_head.")
        case LlamaDecoder():
            return gguf_layout(len(model.layers), "", None)
    raise TypeError(f"no names in GGUF files are known for {type(model).__name__}")


class _Text:
    """A language model's tensors, rows of queries and keys in our order."""

    def __init__(self, model: GgufModel) -> None:
        self._files, self._head_width = model.texts, model.head_width
        self._has_pairs = model.architecture == _PAIRED
        self.specs: Mapping[str, TensorSpec] = model.text_specs

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor = self._owner(name).read(name)
        if not self._is_turned(name):
            return tensor
        if self._head_width % 2 or tensor.shape[0] % self._head_width:
            raise CheckpointError(f"{name} has {tensor.shape[0]} rows, which are no heads of the width {self._head_width}")
        return to_halves(tensor, self._head_width)

    def place(self, name: str) -> FilePlace | None:
        """Return where the bytes of a tensor whose rows keep their order lie."""
        return None if self._is_turned(name) else self._owner(name).place(name)

    def _is_turned(self, name: str) -> bool:
        return self._has_pairs and _ROTARY.fullmatch(name) is not None

    def _owner(self, name: str) -> GgufFile:
        return next(file for file in self._files if name in file.specs)

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order that disks like."""
        for file in self._files:
            yield from file.in_file_order()


class _Tower:
    """A tower's and a projector's tensors, with a last norm that changes nothing where there is none."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        width = file.stated("clip.vision.embedding_length", int)
        self._missing = [name for name in _POST_NORM if name not in file.specs]
        self.specs: Mapping[str, TensorSpec] = {
            **file.specs,
            **{name: TensorSpec(torch.float32, (width,), 0, 0) for name in self._missing},
        }

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        if name not in self._missing:
            return self._file.read(name)
        spec = self.specs[name]
        return torch.ones(spec.shape) if name.endswith("weight") else torch.zeros(spec.shape)

    def place(self, name: str) -> FilePlace | None:
        """Return where the bytes of a tensor that is there lie."""
        return None if name in self._missing else self._file.place(name)

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order that disks like."""
        yield from self._missing
        yield from self._file.in_file_order()
