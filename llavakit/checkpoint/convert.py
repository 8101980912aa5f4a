"""From one layout to another, tensor by tensor.

Owns: convert_meta. Invariants: names and shapes are checked before a weight is read; memory holds one tensor; the destination
appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llavakit.checkpoint.hf import MAX_SHARD_BYTES, write_checkpoint
from llavakit.checkpoint.layouts import LLAMA
from llavakit.checkpoint.load import check_finite
from llavakit.checkpoint.meta import MetaFolder
from llavakit.checkpoint.rules import plan_load
from llavakit.errors import CheckpointError
from llavakit.model.llava import LlamaCore
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.storage.folder import atomic_folder

__all__ = ["convert_meta"]


def convert_meta(
    source: Path,
    destination: Path,
    *,
    tokenizer: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Convert a Llama of Meta's layout to the HF layout, with the tokenizer of another folder.

    dtype None keeps the files' own. progress is told the bytes that are done and those in all. Raises: CheckpointError, and
    StorageError where the destination exists (an empty folder may).
    """
    words = load_tokenizer(tokenizer)
    with MetaFolder(source) as files:
        config = files.config
        if len(words) > config.vocab_size:
            raise CheckpointError(
                f"{tokenizer} has a tokenizer of {len(words)} tokens, the model has {config.vocab_size} rows; they do not fit"
            )
        config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
        with torch.device("meta"):
            core = LlamaCore(config)
        targets = {name: tuple(weight.shape) for name, weight in core.named_parameters()}
        plan = plan_load(LLAMA, {name: spec.shape for name, spec in files.specs.items()}, targets, tied={})
        sources = {target: name for name, target in plan.items()}
        dtypes = {target: files.specs[name].dtype if dtype is None else dtype for target, name in sources.items()}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            done, total = 0, sum(spec.num_bytes for spec in files.specs.values())
            for target in targets:
                tensor = files.read(sources[target]).to(dtypes[target])
                check_finite(sources[target], tensor)
                yield target, tensor
                done += files.specs[sources[target]].num_bytes
                if progress is not None:
                    progress(done, total)

        is_empty = destination.is_dir() and not any(destination.iterdir())
        with atomic_folder(destination, overwrite=is_empty) as folder:
            write_checkpoint(core, folder, dtypes, tensors(), processor=words, source=source, max_shard_bytes=max_shard_bytes)
