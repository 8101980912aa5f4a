"""A checkpoint of any layout, open for reading: its config, its tensors by our names, what prepares its prompts.

Owns: open_checkpoint and Checkpoint, on which converting and verifying build.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llavakit.checkpoint.load import build_core, load_config, load_processor, load_words, plan_parts, read_weight, tied_names
from llavakit.checkpoint.parts import Part, Sources, open_parts
from llavakit.errors import CheckpointError
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.storage.tensors import TensorSpec

__all__ = ["Checkpoint", "Need", "Processor", "Weight", "open_checkpoint", "tokenizer_of"]

Processor = LlavaProcessor | TextProcessor | LlamaTokenizer | LlamaTokenizerFast
Need = Literal["files", "words", "chat"]
"""What goes along in the HF layout (a language model alone has no more than a tokenizer); the tokenizer alone; a processor that chats."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a parameter's values lie."""

    part: Part
    name: str
    """In that part's files."""

    @property
    def spec(self) -> TensorSpec:
        """Dtype, shape and place."""
        return self.part.tensors.specs[self.name]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the values, cast to dtype unless it is None. Raises: CheckpointError, also for values that are not finite."""
        return read_weight(self.part.tensors, self.name, dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are open."""

    config: LlamaConfig | LlavaConfig
    parts: tuple[Part, ...]
    processor: Processor
    """What was needed of it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return tokenizer_of(self.processor)

    @functools.cached_property
    def core(self) -> LlamaCore | LlavaCore:
        """The model on the meta device: names and shapes."""
        return build_core(self.config)

    @functools.cached_property
    def weights(self) -> Mapping[str, Weight]:
        """Parameter -> its values, shared ones under each of their names. Raises: CheckpointError where tensors do not fit the config."""
        plan = plan_parts(self.core, self.parts)
        found = {target: Weight(self.parts[number], name) for (number, name), target in plan.items()}
        return {**{name: found[owner] for name, owner in tied_names(self.core).items()}, **found}


@contextlib.contextmanager
def open_checkpoint(
    folder: Path, sources: Sources = Sources(), *, tokenizer: Path | None = None, needs: Need = "files"
) -> Iterator[Checkpoint]:
    """Open a folder of any layout, or a GGUF file, and what it builds on.

    tokenizer is the folder of the tokenizer, where it is not the model's own. Raises: CheckpointError, ConfigError.
    """
    config = load_config(folder, sources)
    if tokenizer is None:
        processor = _processor(folder, config, sources, needs)
    else:
        processor = words = load_tokenizer(tokenizer)
        config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    _check_rows(processor, config.get_text_config().vocab_size)
    with open_parts(folder, build_core(config), sources) as parts:
        yield Checkpoint(config, parts, processor)


def tokenizer_of(processor: Processor) -> Tokenizer:
    """Return the tokenizer of a processor, or the tokenizer that stands for one."""
    return processor.tokenizer if isinstance(processor, LlavaProcessor | TextProcessor) else processor


def _processor(folder: Path, config: LlamaConfig | LlavaConfig, sources: Sources, needs: Need) -> Processor:
    if needs == "chat" or (needs == "files" and isinstance(config, LlavaConfig)):
        return load_processor(folder, config, sources=sources)
    return load_words(folder, sources)


def _check_rows(processor: Processor, rows: int) -> None:
    """Check that each token has a row, but for those that are added where there is none. Raises: CheckpointError."""
    words = tokenizer_of(processor)
    added = {processor.image_token_id, words.pad_token_id} if isinstance(processor, LlavaProcessor) else set()
    if any(index not in added for index in range(rows, len(words))):
        raise CheckpointError(f"the tokenizer has {len(words)} tokens, the model has {rows} rows; they do not belong together")
