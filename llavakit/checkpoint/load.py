"""From a checkpoint folder to a model, tensor by tensor.

Owns: load_config, load_core, load_weights (streaming into a model on the meta device), load_processor.
Invariants: problems of names and shapes are found before any weight is read; at any moment memory holds the model so far and
one tensor; NaN and infinite weights are refused, also those that the target dtype makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llavakit.checkpoint.detect import Kind, detect_kind, foreign_kind
from llavakit.checkpoint.gguf_read import is_gguf
from llavakit.checkpoint.gguf_settings import gguf_jinja, gguf_processor, gguf_tokenizer, read_gguf_config
from llavakit.checkpoint.meta import is_meta_folder
from llavakit.checkpoint.original import fit_tower_depth, original_processor, read_original_config
from llavakit.checkpoint.packed import packing_of_config
from llavakit.checkpoint.parts import Part, Sources, is_adapter, kind_of_folder, open_meta, open_parts, open_weights
from llavakit.checkpoint.rules import plan_load
from llavakit.errors import CheckpointError, ConfigError
from llavakit.geometry import num_image_tokens
from llavakit.logs import logger
from llavakit.model.config import DECODERS, LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.chat import ChatTemplate
from llavakit.processing.jinja import jinja_text
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.template_choice import find_jinja, template_of_checkpoint
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.load import has_tokenizer, load_tokenizer
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.documents import read_json
from llavakit.storage.pickle_tensors import PICKLE
from llavakit.storage.tensors import DTYPES, SAFETENSORS, TensorSource

__all__ = [
    "build_core",
    "check_finite",
    "choose_preprocessing",
    "load_config",
    "load_core",
    "load_jinja",
    "load_processor",
    "load_weights",
    "load_words",
    "plan_parts",
    "read_weight",
    "set_weight",
    "tied_names",
]

_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_LOG = logger("checkpoint")


def load_config(folder: Path, sources: Sources = Sources()) -> LlamaConfig | LlavaConfig:
    """Read config.json, GGUF metadata or Meta's params.json: the content decides which model it is; an adapter may have its base's.

    Raises: CheckpointError.
    """
    if is_gguf(folder):
        return read_gguf_config(folder, sources.gguf_tower())
    if is_meta_folder(folder):
        return _read_meta_config(folder, sources)
    path = folder / "config.json"
    if not path.is_file() and is_adapter(folder):
        return load_config(sources.base_folder(folder), sources.of_base(folder))
    if not path.is_file():
        kind = foreign_kind([file.name for file in folder.iterdir()] if folder.is_dir() else [])
        raise CheckpointError(f"{folder} has no config.json" if kind is None else f"{folder} holds {kind}")
    values = read_json(path)
    try:
        if not is_adapter(folder):  # an adapter's file may say how its base was held while it was trained
            packing_of_config(values)
        match detect_kind(values):
            case Kind.LLAVA_HF:
                if sources.vision_tower is not None:
                    raise CheckpointError(
                        f"the folder holds its own vision tower, so {sources.vision_tower} would not be used; leave it out"
                    )
                return LlavaConfig.from_dict(values)
            case Kind.ORIGINAL:
                return _read_original(folder, values, sources)
        return DECODERS[values["model_type"]].from_dict(values)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_original(folder: Path, values: Mapping[str, Any], sources: Sources) -> LlavaConfig:
    config = read_original_config(values, sources.vision_tower)
    has_names = SAFETENSORS.is_in(folder) or (sources.allow_pickle and PICKLE.is_in(folder))
    if has_names and not config.vision_config.has_cls:
        with open_weights(folder, allow_pickle=sources.allow_pickle) as files:
            fit_tower_depth(config, files.specs)
    return config


def _read_meta_config(folder: Path, sources: Sources) -> LlamaConfig:
    with open_meta(folder, sources) as files:
        config = files.config
    if has_tokenizer(folder):
        words = load_tokenizer(folder)
        config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    return config


def load_core(
    folder: Path,
    config: LlamaConfig | LlavaConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sources: Sources = Sources(),
) -> LlamaCore | LlavaCore:
    """Load the packed core that a config describes, the folder's own if None, in eval mode; dtype None keeps each tensor's own."""
    core = build_core(load_config(folder, sources) if config is None else config)
    load_weights(core, folder, dtype=dtype, device=device, sources=sources)
    return core.eval()


def build_core(config: LlamaConfig | LlavaConfig) -> LlamaCore | LlavaCore:
    """Build a core on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return LlavaCore(config) if isinstance(config, LlavaConfig) else LlamaCore(config)


def load_processor(
    folder: Path, config: LlamaConfig | LlavaConfig, template: ChatTemplate | None = None, sources: Sources = Sources()
) -> LlavaProcessor | TextProcessor:
    """Load the processor of a folder's model; that of its base where the folder has none.

    Raises: CheckpointError, also where it makes other pictures than the config's tower takes.
    """
    if not is_gguf(folder) and kind_of_folder(folder) is Kind.ORIGINAL and isinstance(config, LlavaConfig):
        return original_processor(folder, config, template, tokenizer=_processor_folder(folder, sources))
    folder = _processor_folder(folder, sources, has_pictures=isinstance(config, LlavaConfig))
    if is_gguf(folder):
        processor = gguf_processor(folder, config, template, sources.gguf_tower())
    else:
        processor = (LlavaProcessor if isinstance(config, LlavaConfig) else TextProcessor).from_pretrained(folder, template=template)
    if isinstance(config, LlavaConfig) and isinstance(processor, LlavaProcessor):
        _check_pictures(folder, config, processor)
    return processor


def choose_preprocessing(
    processor: LlavaProcessor | TextProcessor, preprocess: Literal["auto", "crop", "pad"]
) -> LlavaProcessor | TextProcessor:
    """Return the processor with the preprocessing asked for, or say where the files' own differs from training. Raises: ConfigError."""
    if isinstance(processor, TextProcessor):
        if preprocess != "auto":
            raise ConfigError("this model is a language model without a vision tower; leave preprocess out")
        return processor
    if preprocess == "auto":
        if (note := processor.preprocessing_note) is not None:
            _LOG.warning("%s; preprocess=pad does as in training", note)
        return processor
    if processor.image_processor.aspect not in ("crop", "pad"):
        raise ConfigError(f"preprocess {preprocess!r} does not fit a model whose pictures are {processor.image_processor.aspect}")
    return replace(processor, image_processor=replace(processor.image_processor, aspect=preprocess))


def _check_pictures(folder: Path, config: LlavaConfig, processor: LlavaProcessor) -> None:
    """Check that a processor makes the pictures that a model takes. Raises: CheckpointError."""
    vision = config.vision_config
    for name, made, taken in (
        ("pictures of {} pixels", processor.image_processor.crop_px, vision.image_size),
        ("patches of {} pixels", processor.patch_size, vision.patch_size),
        ("{} image tokens for a tile", num_image_tokens(processor.tile_grid), num_image_tokens(config.image_grid)),
        ("image tokens of the id {}", processor.image_token_id, config.image_token_index),
    ):
        if made != taken:
            raise CheckpointError(f"{folder}: the processor's files make {name.format(made)}, config.json takes {name.format(taken)}")
    if (processor.image_processor.aspect == "anyres") != (config.merge is not None):
        raise CheckpointError(f"{folder}: of the processor's files and config.json ({config.model_type}) only one cuts pictures into tiles")


def load_words(folder: Path, sources: Sources) -> LlamaTokenizer | LlamaTokenizerFast:
    """Load the tokenizer of a folder's model alone; that of its base where the folder has none. Raises: CheckpointError."""
    folder = _processor_folder(folder, sources)
    return gguf_tokenizer(folder) if is_gguf(folder) else load_tokenizer(folder)


def load_jinja(folder: Path, sources: Sources) -> str | None:
    """Read a model's chat template as its files have it, or write that of a LLaVA by which it is known; None where there is none.

    Raises: CheckpointError.
    """
    folder = _processor_folder(folder, sources)
    if is_gguf(folder):
        return gguf_jinja(folder)
    if is_meta_folder(folder):
        return None
    if kind_of_folder(folder) is not Kind.ORIGINAL:
        return find_jinja(folder)
    template = template_of_checkpoint(folder).template
    return jinja_text(template) if template.holds_talks else None


def _processor_folder(folder: Path, sources: Sources, *, has_pictures: bool = False) -> Path:
    """Return where a model's tokenizer, and its image processor, lie: in its folder, or in that of its base. Raises: CheckpointError."""
    is_whole = sources.base is None and not is_adapter(folder)
    has_images = not has_pictures or any((folder / name).is_file() for name in _IMAGE_FILES)
    return folder if is_whole or (has_tokenizer(folder) and has_images) else sources.base_folder(folder)


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sources: Sources = Sources(),
) -> None:
    """Fill a model whose parameters are on the meta device from a folder's files, and from those that it builds on.

    Raises: CheckpointError, before anything is filled where names or shapes are wrong.
    """
    tied = tied_names(model)
    with open_parts(folder, model, sources) as parts:
        plan = plan_parts(model, parts)
        for number, part in enumerate(parts):
            for source in part.tensors.in_file_order():
                target = plan.get((number, source))
                if target is not None and target not in tied:
                    set_weight(model, target, nn.Parameter(read_weight(part.tensors, source, dtype).to(device)))
        for (number, source), target in plan.items():
            if target in tied:
                _check_tied(model, source, read_weight(parts[number].tensors, source, dtype), tied[target])
    for name, owner in tied.items():
        set_weight(model, name, model.get_parameter(owner))


def plan_parts(model: nn.Module, parts: Sequence[Part]) -> dict[tuple[int, str], str]:
    """Return (part, name in it) -> parameter of everything that a model reads. Raises: CheckpointError, as plan_load."""
    targets = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    return plan_load([(part.layout, part.shapes) for part in parts], targets, tied=tied_names(model))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a shared parameter to its first one."""
    first: dict[int, str] = {}
    tied = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in first:
            tied[name] = first[id(weight)]
        first.setdefault(id(weight), name)
    return tied


def read_weight(tensors: TensorSource, name: str, dtype: torch.dtype | None) -> Tensor:
    """Read a weight and cast it; None keeps the stored dtype, and makes packed weights that of their spec.

    Raises: CheckpointError for one that no model can have.
    """
    tensor = tensors.read(name)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is stored as {tensor.dtype}; only floating-point weights are read")
    tensor = tensor.to(tensors.specs[name].dtype if dtype is None else dtype)
    check_finite(name, tensor)
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that a weight, or a piece of it, holds only what a model can have. Raises: CheckpointError."""
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"tensor {name} would be of {tensor.dtype}; choose float32, float16 or bfloat16")
    if not _is_finite(tensor):
        raise CheckpointError(f"tensor {name} holds NaN or infinite values in {tensor.dtype}; the file is damaged, or choose a wider dtype")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. One pass, no copy: a NaN anywhere is both the smallest and the largest value."""
    if tensor.numel() == 0:
        return True
    smallest, largest = torch.aminmax(tensor)
    return math.isfinite(smallest.item()) and math.isfinite(largest.item())


def _check_tied(model: nn.Module, source: str, copy: Tensor, owner: str) -> None:
    """Files may store a shared weight twice; both copies must be the same."""
    if not torch.equal(copy.to(model.get_parameter(owner)), model.get_parameter(owner)):
        raise CheckpointError(f"{source} differs from {owner}, but the config ties them; set tie_word_embeddings to false to use both")


def set_weight(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put a parameter in a model, by its whole name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, weight)
