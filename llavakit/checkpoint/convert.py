"""From one layout to another, tensor by tensor.

Owns: convert and its three outputs: the HF layout (LLaVA or language model), original LLaVA's, a LLaVA's language model alone.
Invariants: all names and shapes are settled before a weight is read; memory holds one tensor; the destination appears whole or not
at all; without a change of dtype weights keep their bits. A vocabulary that grew for <image> is cut to its old size on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llavakit.checkpoint.hf import MAX_SHARD_BYTES, write_checkpoint
from llavakit.checkpoint.load import build_core
from llavakit.checkpoint.opening import Checkpoint, Weight, open_checkpoint
from llavakit.checkpoint.original import write_original
from llavakit.checkpoint.parts import Sources, is_adapter
from llavakit.errors import ConfigError
from llavakit.logs import logger
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.surgery import resized_rows
from llavakit.processing.processor import LlavaProcessor
from llavakit.storage.ahead import read_ahead
from llavakit.storage.folder import atomic_folder

__all__ = ["Conversion", "Output", "convert"]

Output = Literal["hf", "original", "text"]
_LOG = logger("checkpoint")
_TEXT = "language_model."
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_OLD_ROWS = "original_vocab_size"
"""Our key in config.json: the rows before <image> needed one."""
_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """How to convert."""

    to: Output = "hf"
    """hf is the Hugging Face layout, original is LLaVA's own, text is a LLaVA's language model alone in the HF layout."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, where it is not the source's."""
    sources: Sources = field(default_factory=Sources)
    """What the folder needs beside itself, and whether pickle files are read."""
    dtype: torch.dtype | None = None
    """Of the new weights; None keeps the files'."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    hashes: bool = True
    """Write SHA-256 sums into the manifest; without them, sizes only, a conversion reads nothing twice."""
    is_dry: bool = False
    """Check everything but write nothing."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where each new tensor comes from."""

    core: LlamaCore | LlavaCore
    """The new model, on the meta device."""
    sources: Mapping[str, Weight]
    """By new parameter, in the order of writing."""
    dtypes: Mapping[str, torch.dtype]

    def num_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(weight.spec.num_bytes for weight in self.sources.values())


def convert(
    source: Path, destination: Path, how: Conversion = Conversion(), progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Convert a checkpoint folder, and return the names of the new tensors.

    progress is told the bytes that are done and those in all. Raises: CheckpointError, ConfigError; StorageError where the destination
    exists (an empty folder may).
    """
    with open_checkpoint(source, how.sources, tokenizer=how.tokenizer, text_only=how.to == "text") as opened:
        plan = _plan(opened, how)
        if how.is_dry:
            return list(plan.sources)
        is_empty = destination.is_dir() and not any(destination.iterdir())
        with atomic_folder(destination, overwrite=is_empty, hashes=how.hashes) as folder:
            tensors = read_ahead(_read(plan, how.dtype, progress))
            write = write_original if how.to == "original" else write_checkpoint
            write(
                plan.core,
                folder,
                plan.dtypes,
                tensors,
                processor=opened.processor,
                source=how.sources.base_folder(source) if is_adapter(source) else source,
                max_shard_bytes=how.max_shard_bytes,
            )
    return list(plan.sources)


def _plan(opened: Checkpoint, how: Conversion) -> _Plan:
    """Decide on names and shapes alone. Raises: CheckpointError, ConfigError."""
    core = build_core(_new_config(opened, how.to))
    prefix = _TEXT if how.to == "text" else ""
    sources = {name: opened.weights[prefix + name] for name, _ in core.named_parameters()}
    dtypes = {name: weight.spec.dtype if how.dtype is None else how.dtype for name, weight in sources.items()}
    return _Plan(core, sources, dtypes)


def _new_config(opened: Checkpoint, to: Output) -> LlamaConfig | LlavaConfig:
    config = opened.config
    if not isinstance(config, LlavaConfig):
        if to != "hf":
            raise ConfigError(f"this is a language model ({config.model_type}) without a vision tower; only --to hf can hold it")
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


def _read(plan: _Plan, dtype: torch.dtype | None, progress: Callable[[int, int], None] | None) -> Iterator[tuple[str, Tensor]]:
    """Read the weights in the order of writing, in pieces; rows are added to or cut from the vocabulary's tables."""
    shapes = {name: tuple(weight.shape) for name, weight in plan.core.named_parameters()}
    done, total = 0, plan.num_bytes()
    for name, weight in plan.sources.items():
        if weight.spec.shape == shapes[name]:
            yield from ((name, piece) for piece in weight.pieces(dtype))
        else:
            assert name.endswith(_EMBEDDINGS), "only the vocabulary changes its size"
            yield name, resized_rows(weight.read(dtype), shapes[name][0])
        done += weight.spec.num_bytes
        if progress is not None:
            progress(done, total)
