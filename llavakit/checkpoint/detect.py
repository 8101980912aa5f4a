"""Which kind of checkpoint a folder holds.

Owns: detect_kind, which decides by the keys of config.json and the names of the files; the folder's own name means nothing.
Refuses: guessing. A known kind that is not read here is named in the error, with the way out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any

from llavakit.errors import CheckpointError
from llavakit.logs import logger
from llavakit.model.config import DECODERS

__all__ = ["Kind", "detect_kind", "foreign_kind", "kind_of_config"]

_LOG = logger("checkpoint")


class Kind(StrEnum):
    """The kinds that are read."""

    LLAVA_HF = "llava-hf"
    ORIGINAL = "original LLaVA"
    DECODER = "decoder"


def detect_kind(values: Mapping[str, Any]) -> Kind:
    """Decide as kind_of_config, and say where the file names code. Raises: CheckpointError."""
    if "auto_map" in values:
        _LOG.warning("config.json names code in the checkpoint (auto_map); code of checkpoints is never run")
    return kind_of_config(values)


def kind_of_config(values: Mapping[str, Any]) -> Kind:
    """Decide by the keys of config.json. Raises: CheckpointError naming what it is instead."""
    match values.get("model_type"):
        case "llava" | "llava_next" if "text_config" in values:
            return Kind.LLAVA_HF
        case str(kind) if kind in DECODERS:
            return Kind.DECODER
        case "llava" | "llava_llama" | "llava_mistral" | "llava_qwen" if any(key.startswith("mm_") for key in values):
            return Kind.ORIGINAL
        case "llava":
            raise CheckpointError("model_type is 'llava' but there is neither text_config (llava-hf) nor mm_* keys (original LLaVA)")
        case kind:
            raise CheckpointError(f"model_type is {kind!r}; llava and llava_next (llava-hf layout), {', '.join(DECODERS)} are read")


def foreign_kind(files: Collection[str]) -> str | None:
    """Name what a folder without config.json holds, by its file names; None where nothing is known."""
    if "mm_projector.bin" in files:
        return "the projector of a LLaVA pre-training without its config.json"
    return None
