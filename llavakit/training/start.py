"""The model that a run begins with, made ready to train.

Owns: Start (folder, config and processor, before weights are read), load_model (dtypes, what is recomputed and compiled) and what is
written at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llavakit.checkpoint.adapter_save import save_adapter
from llavakit.checkpoint.hf import MAX_SHARD_BYTES, write_checkpoint
from llavakit.checkpoint.load import choose_preprocessing, load_config, load_core, load_processor
from llavakit.checkpoint.parts import Sources
from llavakit.errors import ConfigError
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.surgery import add_lora, attend_by, compile_layers, freeze, quantize, recompute_layers
from llavakit.ops.segmented import Segmented
from llavakit.processing.chat import find_template
from llavakit.processing.jinja import jinja_text
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.storage.folder import atomic_folder, manifest_problems
from llavakit.storage.hub import resolve_model
from llavakit.training.config import TrainConfig
from llavakit.training.objectives import COMPUTE_DTYPES
from llavakit.training.parallel import Parallel, whole

__all__ = ["Start", "Trainee", "export_model", "find_start", "load_model"]

Core = LlamaCore | LlavaCore


@dataclass(frozen=True, slots=True)
class Start:
    """Where a model's files lie, and what they say."""

    folder: Path
    sources: Sources
    config: LlamaConfig | LlavaConfig
    processor: LlavaProcessor | TextProcessor


@dataclass(frozen=True, slots=True)
class Trainee:
    """A model that is ready to train."""

    core: Core
    dtypes: Mapping[str, torch.dtype]
    """Of its weights in the files that it came from."""


def find_start(config: TrainConfig) -> Start:
    """Read what a model's files say of it, and choose template and preprocessing. Raises: ConfigError, CheckpointError."""
    source = config.model
    folder = resolve_model(source.path, revision=source.revision, allow_pickle=source.allow_pickle)
    sources = Sources(base=source.base, vision_tower=source.vision_tower, allow_pickle=source.allow_pickle)
    template = None if config.template is None else find_template(config.template)
    model_config = load_config(folder, sources)
    processor = load_processor(folder, model_config, template, sources)
    return Start(folder, sources, model_config, choose_preprocessing(processor, config.preprocess))


def load_model(config: TrainConfig, start: Start, device: torch.device) -> Trainee:
    """Load the weights: what trains becomes float32, what does not the dtype of the activations. Raises: CheckpointError, ConfigError."""
    dtype, is_quantized = COMPUTE_DTYPES[config.decided_dtype], config.quantize != "none"
    core = load_core(start.folder, start.config, sources=start.sources, device="cpu" if is_quantized else device)
    dtypes = {name: weight.dtype for name, weight in core.named_parameters()}
    if is_quantized:
        quantize(core, "nf4", device, has_double_scales=True)
    if config.lora is not None:
        add_lora(core, config.lora, torch.Generator().manual_seed(config.seed))
    freeze(core, config.trainable)
    for weight in core.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.float32 if weight.requires_grad else dtype)
    if config.recompute == "layers":
        recompute_layers(core)
    is_fast = device.type == "cuda" and dtype == torch.bfloat16
    # Pairs attend behind prompts that they share, of which no operator knows.
    is_compiled = config.preference is None and (config.compilation == "layers" or (config.compilation == "auto" and is_fast))
    if is_compiled and device.type == "cuda" and not is_fast:
        raise ConfigError("compiled layers need compute_dtype bfloat16 on CUDA, whose attention kernel has no float32; or compilation none")
    if is_compiled or is_fast:
        attend_by(core, Segmented)
    if is_compiled:
        compile_layers(core)
    return Trainee(core, dtypes)


def export_model(config: TrainConfig, trainee: Trainee, start: Start, folder: Path, parallel: Parallel) -> None:
    """Write the trained model in the llava-hf layout, in the dtypes of the files that it came from, or its adapter in PEFT's; once."""
    if parallel.shared(folder.is_dir() and not manifest_problems(folder, check_hashes=False)):
        return
    core = trainee.core
    if config.lora is None:
        tensors = ((name, whole(weight.detach()).to(trainee.dtypes[name]).cpu()) for name, weight in core.named_parameters())
        if parallel.rank == 0:
            with atomic_folder(folder, overwrite=True) as new:
                write_checkpoint(core, new, trainee.dtypes, tensors, processor=None, source=start.folder, max_shard_bytes=MAX_SHARD_BYTES)
                _write_processor(start.processor, new)
        else:
            for _ in tensors:  # every process takes part in gathering each
                pass
    else:
        trained = {name: whole(weight.detach()).cpu() for name, weight in core.named_parameters() if weight.requires_grad}
        if parallel.rank == 0:
            side = start.processor if isinstance(start.processor, LlavaProcessor) else None
            save_adapter(core, folder, base=config.model.path, weights=trained, processor=side, overwrite=True)
    parallel.wait()


def _write_processor(processor: LlavaProcessor | TextProcessor, folder: Path) -> None:
    """Write a processor's files, and the template that was trained."""
    if isinstance(processor, LlavaProcessor):
        processor.save_pretrained(folder)
        return
    for name, data in processor.tokenizer.files().items():
        (folder / name).write_bytes(data)
    if processor.template.holds_talks:
        (folder / "chat_template.jinja").write_text(jinja_text(processor.template), encoding="utf-8")
