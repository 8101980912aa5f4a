"""The tensors of a checkpoint of any layout, opened part by part.

Owns: Part, Sources and open_parts: which files a model's weights lie in, and by which names. A LLaVA of the original
layout may leave its tower where it was published; adapters, deltas and projectors build on another folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llavakit.checkpoint.adapters import ADAPTER_CONFIG, Adapter, Merged, base_of_adapter
from llavakit.checkpoint.deltas import Summed
from llavakit.checkpoint.detect import Kind, kind_of_config
from llavakit.checkpoint.gguf_read import is_gguf, open_gguf
from llavakit.checkpoint.layouts import LANGUAGE_MODEL, LLAMA, LLAMA_DECODER, LLAVA_HF, TOWER, original_layout
from llavakit.checkpoint.meta import MetaFolder, is_meta_folder
from llavakit.checkpoint.packed import Unpacked, dense_tensors, weight_format
from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError, shortened
from llavakit.logs import logger
from llavakit.model.decoder import LlamaDecoder
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.storage.documents import read_optional_json
from llavakit.storage.hub import check_inside, resolve_model
from llavakit.storage.pickle_tensors import PICKLE, PickleFile
from llavakit.storage.tensors import FilePlace, TensorFolder, TensorSource, TensorSpec

__all__ = [
    "TRAINED_FILES",
    "Part",
    "Sources",
    "has_weights",
    "is_adapter",
    "kind_of_folder",
    "open_adapter",
    "open_meta",
    "open_parts",
    "open_tower",
    "open_trained",
    "open_weights",
    "tower_folder",
]

_PROJECTOR_FILE = "mm_projector.bin"
TRAINED_FILES = (_PROJECTOR_FILE, "non_lora_trainables.bin")
"""What LLaVA's trainings write beside no whole model."""
_OF_LLAVA = re.compile(r"(model\.)*(?P<name>mm_projector\..+|image_newline)")
_BARE = re.compile(r"(\d+\.)?(weight|bias)")
_MOST_ADAPTERS = 16
_LOG = logger("checkpoint")


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a model's tensors, and what their names mean."""

    tensors: TensorSource
    layout: Layout
    folder: Path | None
    """Where the files lie; None for tensors that lie in none."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: spec.shape for name, spec in self.tensors.specs.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What a folder may need beside itself, and what may be read."""

    base: str | Path | None = None
    """Folder or hub id of the model that an adapter, a delta or a projector belongs to."""
    vision_tower: str | Path | None = None
    """Folder or hub id in place of the tower that an original LLaVA's config names; opened only where the folder holds none.

    With a language model alone, convert builds a fresh LLaVA of the two. For a GGUF file the file of its tower and projector.
    """
    allow_pickle: bool = False
    """Read pickle files where there are no safetensors."""
    above: tuple[Path, ...] = ()
    """The adapters, resolved, that the folder is a base of."""

    def base_folder(self, folder: Path) -> Path:
        """Return the folder of the base: the caller's, or the one that an adapter names. Raises: CheckpointError."""
        name = base_of_adapter(folder) if self.base is None and is_adapter(folder) else self.base
        if name is None:
            raise CheckpointError(f"{folder} holds no whole model; name the one that it belongs to with --base")
        base = resolve_model(name, allow_pickle=self.allow_pickle)
        is_endless = base.resolve() in (*self.above, folder.resolve()) or len(self.above) >= _MOST_ADAPTERS
        if is_adapter(base) and is_endless:
            raise CheckpointError(f"{folder} adapts {name}, which adapts others in turn without end; name a whole model with --base")
        return base

    def of_base(self, folder: Path) -> Sources:
        """Return what the base of a folder may need; the caller's base is that of the folder alone."""
        return replace(self, base=None, above=(*self.above, folder.resolve()))

    def gguf_tower(self) -> Path | None:
        """Return the caller's file, or folder, with the tower of a GGUF file. Raises: CheckpointError."""
        return None if self.vision_tower is None else resolve_model(self.vision_tower)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def kind_of_folder(folder: Path) -> Kind | None:
    """Decide by a folder's config.json; None where there is none. Raises: CheckpointError."""
    values = read_optional_json(folder / "config.json")
    return kind_of_config(values) if values else None


@contextlib.contextmanager
def open_parts(folder: Path, model: nn.Module, sources: Sources = Sources()) -> Iterator[tuple[Part, ...]]:
    """Open the files of a model's weights, and those of what it builds on. Raises: CheckpointError."""
    with contextlib.ExitStack() as files:
        yield tuple(_Opening(files, model, sources).parts(folder))


@contextlib.contextmanager
def open_meta(folder: Path, sources: Sources) -> Iterator[MetaFolder]:
    """Open Meta's own files. Raises: CheckpointError, also where pickle files may not be read."""
    if not sources.allow_pickle:
        raise CheckpointError(
            f"{folder} holds Meta's own files, which are pickles; where you trust their origin, allow_pickle reads their tensors "
            "(llava convert-llama-weights makes a folder of the Hugging Face layout of them)"
        )
    with MetaFolder(folder) as files:
        yield files


@contextlib.contextmanager
def open_tower(folder: Path, *, allow_pickle: bool) -> Iterator[Part]:
    """Open the files of a tower, or of a whole CLIP or SigLIP. Raises: CheckpointError."""
    with open_weights(folder, allow_pickle=allow_pickle) as files:
        yield Part(files, TOWER, folder)


@contextlib.contextmanager
def open_adapter(folder: Path, model: nn.Module, sources: Sources = Sources()) -> Iterator[tuple[Adapter, tuple[Part, ...]]]:
    """Open an adapter without the weights of its base, and what was trained beside it. Raises: CheckpointError."""
    with contextlib.ExitStack() as files:
        opening = _Opening(files, model, sources)
        adapter = opening.adapter(folder, opening.module_names(folder))
        yield adapter, opening.trained(folder, adapter.layout)


@contextlib.contextmanager
def open_trained(folder: Path, layout: Layout, *, allow_pickle: bool) -> Iterator[tuple[Part, ...]]:
    """Open what LLaVA's trainings write beside no whole model: mm_projector.bin, non_lora_trainables.bin. Raises: CheckpointError."""
    found = [folder / name for name in TRAINED_FILES if (folder / name).is_file()]
    if not found and not is_adapter(folder):
        raise CheckpointError(f"{folder} has neither weights nor {_PROJECTOR_FILE}")
    if found and not allow_pickle:
        raise CheckpointError(f"{found[0]} is a pickle file; where you trust its origin, allow_pickle reads its tensors")
    with contextlib.ExitStack() as files:
        parts = []
        for path in found:
            check_inside(path, folder)
            file = files.enter_context(contextlib.closing(PickleFile(path)))
            parts.append(Part(_View(file, _plain_names(file.specs, path)), layout, folder))
        yield tuple(parts)


@dataclass(frozen=True, slots=True)
class _Opening:
    """The opening of a model's files; whatever was opened is closed with the stack."""

    files: contextlib.ExitStack
    model: nn.Module
    sources: Sources

    def parts(self, folder: Path) -> list[Part]:
        """Open the parts of a folder."""
        if is_gguf(folder):
            model = self.files.enter_context(open_gguf(folder, self.sources.gguf_tower()))
            return [Part(tensors, layout, folder) for tensors, layout in model.parts(self.model)]
        if kind_of_folder(folder) is Kind.ORIGINAL and isinstance(self.model, LlavaCore):
            return self._original(folder, original_layout(self.model.config.projector_depth))
        if is_meta_folder(folder):
            return [Part(self.files.enter_context(open_meta(folder, self.sources)), _layout(self.model), folder)]
        if is_adapter(folder):
            below = self.sources.base_folder(folder)
            base = _Opening(self.files, self.model, self.sources.of_base(folder)).parts(below)
            return self._merged(base, folder, _layout(self.model) if is_gguf(below) else base[0].layout)
        layout = _layout(self.model)
        return [Part(self._summed(folder, layout), layout, folder)]

    def _original(self, folder: Path, layout: Layout) -> list[Part]:
        """Open original LLaVA's files: whole, a delta, a projector alone, or LoRA with what was trained beside it."""
        if is_adapter(folder) or not has_weights(folder):
            base = self.sources.base_folder(folder)
            base_layout = layout if kind_of_folder(base) is Kind.ORIGINAL else LANGUAGE_MODEL
            parts = [Part(self._open(base, base_layout), base_layout, base), *self.trained(folder, layout)]
            parts = _without_doubles(parts)
            parts = self._merged(parts, folder, layout) if is_adapter(folder) else parts
        else:
            parts = [Part(self._summed(folder, layout), layout, folder)]
        if not any(target.startswith("vision_tower.") for target in _shapes_by_target(parts)):
            values = read_optional_json(folder / "config.json")
            tower = tower_folder(values, self.sources.vision_tower, allow_pickle=self.sources.allow_pickle)
            parts.append(Part(self._open(tower, TOWER), TOWER, tower))
        elif self.sources.vision_tower is not None:
            _LOG.warning("%s holds its own vision tower; the weights of %s are not used", folder, self.sources.vision_tower)
        return parts

    def trained(self, folder: Path, layout: Layout) -> tuple[Part, ...]:
        """Open what was trained beside no whole model."""
        return self.files.enter_context(open_trained(folder, layout, allow_pickle=self.sources.allow_pickle))

    def adapter(self, folder: Path, layout: Layout) -> Adapter:
        """Open an adapter, whose modules' names are those of a layout."""
        adapter = Adapter(folder, layout, allow_pickle=self.sources.allow_pickle)
        self.files.callback(adapter.close)
        return adapter

    def module_names(self, folder: Path) -> Layout:
        """Return the names that modules have in the class that an adapter was trained in: its own config's, or its base's."""
        kind = kind_of_folder(folder)
        if kind is None:
            return _Opening(self.files, self.model, self.sources.of_base(folder)).module_names(self.sources.base_folder(folder))
        if kind is Kind.ORIGINAL and isinstance(self.model, LlavaCore):
            return original_layout(self.model.config.projector_depth)
        return _layout(self.model)

    def _merged(self, parts: list[Part], folder: Path, layout: Layout) -> list[Part]:
        """Merge an adapter, whose modules' names are those of a layout."""
        adapter = self.adapter(folder, layout)
        if problems := adapter.problems(_shapes_by_target(parts)):
            raise CheckpointError(f"the adapter {folder} does not fit its base: {'; '.join(shortened(problems))}")
        return [replace(part, tensors=Merged(part.tensors, part.layout, adapter)) for part in parts]

    def _summed(self, folder: Path, layout: Layout) -> TensorSource:
        """Open a folder's weights; with a base they are its delta."""
        files = self._open(folder, layout)
        return files if self.sources.base is None else Summed(files, self._open(self.sources.base_folder(folder), layout))

    def _open(self, folder: Path, layout: Layout) -> TensorSource:
        """Open a folder's files, quantised ones as dense tensors."""
        tensors = dense_tensors(self.files.enter_context(open_weights(folder, allow_pickle=self.sources.allow_pickle)), folder)
        if not isinstance(tensors, Unpacked):
            return tensors
        # AutoGPTQ gave each module a bias, of zeros where the model has none.
        known = {name for name, _ in self.model.named_parameters()}
        idle = {name for name in tensors.biases if layout.target(name) not in known and not tensors.read(name).any()}
        return _View(tensors, {name: name for name in tensors.specs if name not in idle})


class _View:
    """Some tensors of a source, under other names."""

    def __init__(self, tensors: TensorSource, names: Mapping[str, str]) -> None:
        """Show names' keys, which are its values in the source."""
        self._tensors, self._names = tensors, names
        self.specs: Mapping[str, TensorSpec] = {shown: tensors.specs[stored] for shown, stored in names.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype."""
        return self._tensors.read(self._names[name])

    def place(self, name: str) -> FilePlace | None:
        """Return where a tensor's bytes lie as they are."""
        return self._tensors.place(self._names[name])

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order that disks like."""
        shown = {stored: name for name, stored in self._names.items()}
        return (shown[stored] for stored in self._tensors.in_file_order() if stored in shown)


def _shapes_by_target(parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by our names, those without one left out."""
    named = ((part.layout.target(name), spec.shape) for part in parts for name, spec in part.tensors.specs.items())
    return {target: shape for target, shape in named if target is not None}


def _without_doubles(parts: list[Part]) -> list[Part]:
    """Leave out of the base what was trained anew."""
    base, *others = parts
    trained = _shapes_by_target(others)
    kept = {name: name for name in base.tensors.specs if base.layout.target(name) not in trained}
    return [replace(base, tensors=_View(base.tensors, kept)), *others]


def _plain_names(names: Collection[str], path: Path) -> dict[str, str]:
    """Return the tensors of a file of LLaVA's trainings by the name that each has in a whole model.

    By the rule of its builder, and that of its training for projectors, which may stand behind any wrapper's prefix or, in a file of
    their own, behind none. Raises: CheckpointError where two have one name.
    """
    inner = [name.removeprefix("module.").removeprefix("base_model.") for name in names]
    is_nested = any(name.startswith("model.model.") for name in inner)
    shown: dict[str, str] = {}
    for stored, name in zip(names, inner, strict=True):
        if (match := _OF_LLAVA.fullmatch(name)) is not None:
            plain = f"model.{match['name']}"
        elif path.name == _PROJECTOR_FILE and _BARE.fullmatch(name) is not None:
            plain = f"model.mm_projector.{name}"
        else:
            plain = name.removeprefix("model.") if is_nested else name
        if plain in shown:
            raise CheckpointError(f"{stored} and {shown[plain]} in {path} are both {plain}")
        shown[plain] = stored
    return shown


def open_weights(folder: Path, *, allow_pickle: bool) -> TensorFolder:
    """Open a folder's safetensors, or its pickle files where they are wanted and there are none. Raises: CheckpointError."""
    safe = weight_format(folder)
    is_pickle = allow_pickle and not safe.is_in(folder) and PICKLE.is_in(folder)
    return TensorFolder(folder, PICKLE if is_pickle else safe)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of its own, safetensors or pickle files."""
    return weight_format(folder).is_in(folder) or PICKLE.is_in(folder)


def tower_folder(values: Mapping[str, Any], vision_tower: str | Path | None, *, allow_pickle: bool, weights: bool = True) -> Path:
    """Return the folder of an original LLaVA's tower: what the caller names, else what config.json does. Raises: CheckpointError."""
    name = vision_tower if vision_tower is not None else values.get("mm_vision_tower", values.get("vision_tower"))
    if not isinstance(name, str | Path) or not str(name):
        raise CheckpointError("config.json names no mm_vision_tower, and the folder holds none; say which tower it is")
    try:
        return resolve_model(name, parts="model" if weights else "processor", allow_pickle=allow_pickle)
    except CheckpointError as error:
        raise CheckpointError(f"the model's vision tower is not in its own folder: {error}; --vision-tower names a folder") from error


def _layout(model: nn.Module) -> Layout:
    match model:
        case LlavaCore():
            return LLAVA_HF
        case LlamaCore():
            return LLAMA
        case LlamaDecoder():
            return LLAMA_DECODER
    raise TypeError(f"no checkpoint layout is known for {type(model).__name__}")
