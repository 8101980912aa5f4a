"""From one layout to another, tensor by tensor.

Owns: convert and its outputs: the HF layout (LLaVA or language model), original LLaVA's, a LLaVA's language model alone, GGUF.
Invariants: all names and shapes are settled before a weight is read; memory holds one tensor; the destination appears whole or not
at all; without a change of dtype weights keep their bits. A vocabulary that grew for <image> is cut to its old size on the way back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llavakit.checkpoint.gguf_write import GgufType, gguf_kinds, write_gguf
from llavakit.checkpoint.hf import MAX_SHARD_BYTES, SideFiles, write_checkpoint
from llavakit.checkpoint.layouts import LLAMA
from llavakit.checkpoint.load import build_core, load_config, load_processor, load_words, plan_parts, read_weight
from llavakit.checkpoint.meta import MetaFolder, is_meta_folder
from llavakit.checkpoint.original import write_original
from llavakit.checkpoint.parts import Part, Sources, is_adapter, open_parts
from llavakit.errors import CheckpointError, ConfigError
from llavakit.logs import logger
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.surgery import resized_rows
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.storage.folder import atomic_folder
from llavakit.storage.gguf_file import GgufKind

__all__ = ["Conversion", "Output", "convert"]

Output = Literal["hf", "original", "text", "gguf"]
_LOG = logger("checkpoint")
_TEXT = "language_model."
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_OLD_ROWS = "original_vocab_size"
"""Our key in config.json: the rows before <image> needed one."""
_MULTIPLE = 64
_GGUF_TYPE: GgufType = "f16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """How to convert."""

    to: Output = "hf"
    """hf is the Hugging Face layout, original is LLaVA's own, text is a LLaVA's language model alone in the first, gguf is llama.cpp's."""
    gguf_type: GgufType | None = None
    """How GGUF files store matrices; None means f16. Only for them."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, where it is not the source's."""
    sources: Sources = field(default_factory=Sources)
    """What the folder needs beside itself, and whether pickle files are read."""
    dtype: torch.dtype | None = None
    """Of the new weights; None keeps the files'."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    is_dry: bool = False
    """Check everything but write nothing."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint of any layout."""

    config: LlamaConfig | LlavaConfig
    parts: tuple[Part, ...]
    processor: SideFiles | TextProcessor


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where each new tensor comes from."""

    core: LlamaCore | LlavaCore
    """The new model, on the meta device."""
    sources: Mapping[str, tuple[Part, str]]
    """By new parameter, in the order of writing."""
    dtypes: Mapping[str, torch.dtype]
    """That they are read in."""
    kinds: Mapping[str, GgufKind]
    """How GGUF files store them; empty for other outputs."""

    def num_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(part.tensors.specs[name].num_bytes for part, name in self.sources.values())


def convert(
    source: Path, destination: Path, how: Conversion = Conversion(), progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Convert a checkpoint folder, and return the names of the new tensors.

    progress is told the bytes that are done and those in all. Raises: CheckpointError, ConfigError; StorageError where the destination
    exists (an empty folder may).
    """
    _check_kinds(how)
    with _open(source, how) as opened:
        plan = _plan(opened, how)
        if how.is_dry:
            return list(plan.sources)
        is_empty = destination.is_dir() and not any(destination.iterdir())
        with atomic_folder(destination, overwrite=is_empty) as folder:
            _write(opened, plan, folder, _read(plan, progress), how, source)
    return list(plan.sources)


def _check_kinds(how: Conversion) -> None:
    """Refuse what would not be heeded. Raises: ConfigError."""
    if how.to == "gguf" and how.dtype is not None:
        raise ConfigError("GGUF files have kinds of their own: leave dtype out and choose gguf_type")
    if how.to != "gguf" and how.gguf_type is not None:
        raise ConfigError(f"gguf_type is for GGUF files, not for {how.to}; choose dtype")


def _write(opened: _Opened, plan: _Plan, folder: Path, tensors: Iterator[tuple[str, Tensor]], how: Conversion, source: Path) -> None:
    origin = how.sources.base_folder(source) if is_adapter(source) else source
    if how.to == "gguf":
        write_gguf(plan.core, folder, plan.kinds, tensors, processor=opened.processor, source=origin, type=how.gguf_type or _GGUF_TYPE)
        return
    assert not isinstance(opened.processor, TextProcessor), "the other outputs take tokenizers"
    write = write_original if how.to == "original" else write_checkpoint
    write(plan.core, folder, plan.dtypes, tensors, processor=opened.processor, source=origin, max_shard_bytes=how.max_shard_bytes)


@contextlib.contextmanager
def _open(source: Path, how: Conversion) -> Iterator[_Opened]:
    if is_meta_folder(source):
        if not how.sources.allow_pickle:
            raise CheckpointError(f"{source} holds pickle files; where you trust their origin, allow_pickle reads their tensors")
        words = load_tokenizer(source if how.tokenizer is None else how.tokenizer)
        with MetaFolder(source) as files:
            files.config.bos_token_id, files.config.eos_token_id = words.bos_token_id, words.eos_token_id
            _check_rows(words, files.config)
            yield _Opened(files.config, (Part(files, LLAMA),), words)
        return
    config = load_config(source, how.sources)
    processor = _side_files(source, config, how)
    with open_parts(source, build_core(config), how.sources) as parts:
        yield _Opened(config, parts, processor)


def _side_files(source: Path, config: LlamaConfig | LlavaConfig, how: Conversion) -> SideFiles | TextProcessor:
    if how.to == "gguf" or (isinstance(config, LlavaConfig) and how.to != "text"):
        return load_processor(source, config, sources=how.sources)
    words = load_words(source, how.sources)
    _check_rows(words, config.get_text_config())
    return words


def _check_rows(words: Tokenizer, config: LlamaConfig) -> None:
    if len(words) > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {len(words)} tokens, the model has {config.vocab_size} rows; they do not belong together")


def _plan(opened: _Opened, how: Conversion) -> _Plan:
    """Decide on names and shapes alone. Raises: CheckpointError, ConfigError."""
    plan = plan_parts(build_core(opened.config), opened.parts)
    found = {target: (opened.parts[number], name) for (number, name), target in plan.items()}
    core = build_core(_new_config(opened, how.to))
    kinds = gguf_kinds(core, how.gguf_type or _GGUF_TYPE) if how.to == "gguf" else {}
    prefix = _TEXT if how.to == "text" else ""
    sources = {name: found[prefix + name] for name, _ in core.named_parameters() if how.to != "gguf" or name in kinds}
    stored = {name: part.tensors.specs[source].dtype for name, (part, source) in sources.items()}
    asked = {name: torch.float32 if kind.is_packed else kind.dtype for name, kind in kinds.items()}
    return _Plan(core, sources, asked or (stored if how.dtype is None else dict.fromkeys(stored, how.dtype)), kinds)


def _new_config(opened: _Opened, to: Output) -> LlamaConfig | LlavaConfig:
    config = opened.config
    if to == "gguf":
        return config
    if not isinstance(config, LlavaConfig):
        if to != "hf":
            raise ConfigError(f"this is a language model ({config.model_type}) without a vision tower; --to hf and gguf can hold it")
        return config
    if to == "text":
        return type(config.text_config).from_dict(config.text_config.to_dict())
    values = config.to_dict()
    rows = values.pop(_OLD_ROWS, config.text_config.vocab_size)
    if to == "hf":
        if config.mm_projector_type != "mlp2x_gelu":
            _LOG.warning("transformers knows only projectors of two layers, not %s; llavakit reads this folder", config.mm_projector_type)
        assert isinstance(opened.processor, LlavaProcessor)
        rows = config.text_config.vocab_size
        if config.pad_token_id is None:
            values["pad_token_id"] = opened.processor.tokenizer.pad_token_id
        if (needed := len(opened.processor.tokenizer)) > rows:
            values[_OLD_ROWS] = rows
            rows = needed + -needed % _MULTIPLE
    return _with_rows(type(config), values, rows)


def _with_rows(kind: type[LlavaConfig], values: dict[str, Any], rows: int) -> LlavaConfig:
    values["text_config"] = {**values["text_config"], "vocab_size": rows}
    if "vocab_size" in values:
        values["vocab_size"] = rows
    return kind.from_dict(values)


def _read(plan: _Plan, progress: Callable[[int, int], None] | None) -> Iterator[tuple[str, Tensor]]:
    """Read the weights in the order of writing; rows are added to or cut from the vocabulary's tables."""
    shapes = {name: tuple(weight.shape) for name, weight in plan.core.named_parameters()}
    done, total = 0, plan.num_bytes()
    for name, (part, source) in plan.sources.items():
        tensor = read_weight(part.tensors, source, plan.dtypes[name])
        if tuple(tensor.shape) != shapes[name]:
            assert name.endswith(_EMBEDDINGS), "only the vocabulary changes its size"
            tensor = resized_rows(tensor, shapes[name][0])
        yield name, tensor
        done += part.tensors.specs[source].num_bytes
        if progress is not None:
            progress(done, total)
