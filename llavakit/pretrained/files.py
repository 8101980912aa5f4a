"""from_pretrained and save_pretrained of the public classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from llavakit.checkpoint.hf import MAX_SHARD_BYTES, save_folder
from llavakit.checkpoint.load import load_config, load_weights
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.surgery import init_weights
from llavakit.processing.processor import LlavaProcessor
from llavakit.storage.hub import resolve_model

__all__ = ["PretrainedFiles"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PretrainedFiles(nn.Module):
    """Loading and saving for a class with config_class and __init__(config)."""

    config_class: Any
    config: Any

    @classmethod
    def from_pretrained(cls, model: str | Path, *, dtype: torch.dtype | Literal["float32", "float16", "bfloat16", "auto"] = "auto") -> Self:
        """Load from a folder or a hub id, in eval mode; "auto" keeps the dtype of the files.

        Raises: CheckpointError when it is another kind of model, incomplete or damaged.
        """
        folder = resolve_model(model)
        config = load_config(folder)
        if not isinstance(config, cls.config_class):
            raise CheckpointError(f"{folder} holds a {config.model_type} model, {cls.__name__} needs {cls.config_class.model_type}")
        if isinstance(dtype, str) and dtype != "auto" and dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)} or auto, got {dtype!r}")
        with torch.device("meta"):
            built = cls(config)
        load_weights(built, folder, dtype=_DTYPES.get(dtype) if isinstance(dtype, str) else dtype)
        return built.eval()

    def save_pretrained(
        self, folder: str | Path, *, processor: LlavaProcessor | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Save in the HF layout, atomically; give the processor too for a folder that is complete for everybody."""
        save_folder(self, Path(folder), processor=processor, max_shard_bytes=max_shard_bytes)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        """Count the weights, shared ones once."""
        return sum(weight.numel() for weight in self.parameters())

    def init_if_real(self) -> None:
        """Give a fresh model random weights from torch's global generator; a model on the meta device gets none."""
        if self.device.type != "meta":
            init_weights(self, self.config.get_text_config().initializer_range, torch.default_generator)
