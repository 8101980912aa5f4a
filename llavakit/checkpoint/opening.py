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

from llavakit.checkpoint.layouts import LLAMA
from llavakit.checkpoint.load import build_core, load_config, load_processor, load_words, plan_parts, read_weight, tied_names
from llavakit.checkpoint.meta import MetaFolder, is_meta_folder
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

Processor = LlavaProcessor | TextProcessor | LlamaTokenizer | LlamaTokenizerFast
Need = Literal["files", "words", "chat"]
"""What goes along in the HF layout (a language model alone has no more than a tokenizer); the tokenizer alone; a processor that chats."""

__all__ = ["Checkpoint", "Need", "Processor", "Weight", "open_checkpoint"]


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
        return self.processor.tokenizer if isinstance(self.processor, LlavaProcessor | TextProcessor) else self.processor

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
    if is_meta_folder(folder):
        if not sources.allow_pickle:
            raise CheckpointError(f"{folder} holds pickle files; where you trust their origin, allow_pickle reads their tensors")
        words = load_tokenizer(folder if tokenizer is None else tokenizer)
        with MetaFolder(folder) as files:
            files.config.bos_token_id, files.config.eos_token_id = words.bos_token_id, words.eos_token_id
            _check_rows(words, files.config)
            yield Checkpoint(files.config, (Part(files, LLAMA),), words)
        return
    config = load_config(folder, sources)
    processor = _processor(folder, config, sources, needs)
    with open_parts(folder, build_core(config), sources) as parts:
        yield Checkpoint(config, parts, processor)


def _processor(folder: Path, config: LlamaConfig | LlavaConfig, sources: Sources, needs: Need) -> Processor:
    if needs == "chat" or (needs == "files" and isinstance(config, LlavaConfig)):
        return load_processor(folder, config, sources=sources)
    words = load_words(folder, sources)
    _check_rows(words, config.get_text_config())
    return words


def _check_rows(words: Tokenizer, config: LlamaConfig) -> None:
    if len(words) > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {len(words)} tokens, the model has {config.vocab_size} rows; they do not belong together")
