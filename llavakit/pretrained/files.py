"""from_pretrained, save_pretrained and push_to_hub of the public classes.

Arguments have the names that users of transformers know; each is used or refused, none is ignored.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from llavakit.checkpoint.card import CardFacts, build_card, choose_licence
from llavakit.checkpoint.generation import GenerationDefaults, load_generation
from llavakit.checkpoint.hf import SideFiles, parse_size, save_folder
from llavakit.checkpoint.load import load_config, load_weights
from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.placement import choose_device, choose_dtype, dtype_name
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.surgery import init_weights
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.hub import is_hub_id, resolve_model, upload_folder

__all__ = ["ModelSource", "PretrainedFiles"]

_SHARD_SIZE = "5GB"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model was loaded from: what the user called it, and the folder."""

    name: str
    folder: Path


class PretrainedFiles(nn.Module):
    """Loading and saving for a class with config_class and __init__(config)."""

    config_class: Any
    config: Any
    source: ModelSource | None = None
    """Where from_pretrained found it; None for a fresh model."""
    generation: GenerationDefaults = GenerationDefaults()
    """What its generation_config.json says."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: str | torch.device | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        base: str | Path | None = None,
        vision_tower: str | Path | None = None,
        allow_pickle: bool = False,
        low_cpu_mem_usage: bool = True,
    ) -> Self:
        """Load from a folder or a hub id, in eval mode.

        dtype (or torch_dtype) is a torch dtype or its name; "auto", the default, keeps that of the files. device (or device_map) is
        one device; "auto" is CUDA where there is one, the default is the CPU. config replaces the folder's own. Memory always holds
        the model and one tensor at most, so low_cpu_mem_usage cannot be switched off. The hub's arguments are resolve_model's. base and
        vision_tower are folders or hub ids: what an adapter, a delta or a projector belongs to, and the tower of an original LLaVA that
        does not hold its own.
        Raises: CheckpointError when it is another kind of model, incomplete or damaged; ConfigError for arguments.
        """
        if not low_cpu_mem_usage:
            raise ConfigError("low_cpu_mem_usage=False is not offered: weights are always read one by one; leave it out")
        chosen_dtype = choose_dtype(_one_of("dtype", "torch_dtype", dtype, torch_dtype))
        asked_device = _one_of("device", "device_map", device, device_map)
        chosen_device = choose_device("cpu" if asked_device is None else asked_device)
        if config is not None and not isinstance(config, cls.config_class):
            raise ConfigError(f"config must be a {cls.config_class.__name__} for {cls.__name__}, got {type(config).__name__}")
        folder = resolve_model(
            model,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_pickle=allow_pickle,
        )
        sources = Sources(base=base, vision_tower=vision_tower, allow_pickle=allow_pickle)
        if config is None:
            config = load_config(folder, sources)
        if not isinstance(config, cls.config_class):
            raise CheckpointError(f"{folder} holds a {config.model_type} model, {cls.__name__} needs {cls.config_class.model_type}")
        with torch.device("meta"):
            built = cls(config)
        load_weights(built, folder, dtype=chosen_dtype, device=chosen_device, sources=sources)
        built.source = ModelSource(str(model), folder)
        built.generation = load_generation(folder)
        return built.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        processor: LlavaProcessor | None = None,
        tokenizer: LlamaTokenizer | LlamaTokenizerFast | None = None,
        max_shard_size: int | str = _SHARD_SIZE,
        safe_serialization: bool = True,
    ) -> None:
        """Save in the HF layout, atomically; give the processor (or a tokenizer) too for a folder that is complete for everybody.

        max_shard_size is in bytes, or text like "5GB" or "200MiB". Licence files of the folder that it was loaded from go along.
        Raises: ConfigError for arguments, StorageError when the disk refuses.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False is not offered: only safetensors are written, which everybody reads; leave it out")
        save_folder(
            self,  # type: ignore[arg-type]
            Path(folder),
            processor=_side_files(processor, tokenizer),
            source=None if self.source is None else self.source.folder,
            max_shard_bytes=parse_size("max_shard_size", max_shard_size),
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: LlavaProcessor | None = None,
        tokenizer: LlamaTokenizer | LlamaTokenizerFast | None = None,
        private: bool = False,
        revision: str | None = None,
        commit_message: str = "Upload the model",
        token: str | bool | None = None,
        license: str | None = None,
        max_shard_size: int | str = _SHARD_SIZE,
    ) -> str:
        """Save into a temporary folder, add a model card, upload it all, and return the address of the commit.

        license is the hub's id of one; left out, it is taken from the card or the licence files of the folder that the model came
        from. revision is a branch. Raises: CheckpointError when the hub refuses, ConfigError for arguments.
        """
        if not is_hub_id(repo_id):
            raise ConfigError(f"repo_id must be owner/name, got {repo_id!r}")
        source = self.source
        card = build_card(
            CardFacts(
                name=repo_id,
                config=self.config,
                class_name=type(self).__name__,
                num_parameters=self.num_parameters(),
                dtype=dtype_name(self.dtype),
                processor=processor,
                base_model=source.name if source is not None and source.folder != Path(source.name) else None,
                licence=choose_licence(license, None if source is None else source.folder),
            )
        )
        with tempfile.TemporaryDirectory(prefix="llavakit-") as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, processor=processor, tokenizer=tokenizer, max_shard_size=max_shard_size)
            (folder / "README.md").write_text(card, encoding="utf-8")
            return upload_folder(folder, repo_id, private=private, revision=revision, message=commit_message, token=token)

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


def _one_of(first: str, second: str, given: Any, alias: Any) -> Any:
    """Return what was given under either name. Raises: ConfigError when it was given under both."""
    if given is not None and alias is not None:
        raise ConfigError(f"{first} and {second} are the same thing here; give one of them")
    return alias if given is None else given


def _side_files(processor: LlavaProcessor | None, tokenizer: LlamaTokenizer | LlamaTokenizerFast | None) -> SideFiles | None:
    if processor is not None and tokenizer is not None:
        raise ConfigError("the processor holds the tokenizer; give one of them")
    return tokenizer if processor is None else processor
