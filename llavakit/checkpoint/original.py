"""Original LLaVA's folders: what their config.json means, and the processor that they leave to the code.

Owns: read_original_config, fit_tower_depth, original_processor, write_original, and their parts that a fresh LLaVA is made of.
Refuses: the folder's name, by which original LLaVA chooses.
Sources: llava/model/builder.py, clip_encoder.py and mm_utils.py of LLaVA and LLaVA-NeXT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoint.card import copy_licences
from llavakit.checkpoint.generation import GENERATION_NAME
from llavakit.checkpoint.layouts import original_layout
from llavakit.checkpoint.parts import tower_folder
from llavakit.checkpoint.placement import WEIGHT_KEYS, common_dtype_name
from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig, LlavaNextConfig, published_tower
from llavakit.model.vision_config import TOWERS, ClipVisionConfig
from llavakit.processing.chat import ChatTemplate
from llavakit.processing.image import Aspect, ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.template_choice import TEMPLATE_KEY, template_of_checkpoint, trained_template
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.documents import read_json, write_json
from llavakit.storage.tensors import write_tensors

__all__ = [
    "IMAGE_TOKEN",
    "build_processor",
    "default_images",
    "fit_tower_depth",
    "original_processor",
    "read_original_config",
    "read_tower_config",
    "write_original",
]

IMAGE_TOKEN = "<image>"
_MARKS = ("<im_start>", "<im_end>")
_HALF = (0.5, 0.5, 0.5)
_TOWER_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d{1,4})\.")
_WHOLE_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""model_type of a tower with its text side -> that of the tower."""
_CLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
}  # fmt: skip
"""What a CLIP's own file leaves out; in a LLaVA's file the defaults are those of CLIP-L at 336 pixels."""
_ASPECTS: Mapping[str, Aspect] = {"pad": "pad", "anyres": "anyres", "square": "crop", "": "crop"}


def read_original_config(values: Mapping[str, Any], vision_tower: str | Path | None = None) -> LlavaConfig:
    """Read the flat form; a tower that is not one of the published is described by its own folder.

    Raises: ConfigError, CheckpointError.
    """
    if values.get("vision_config") is None and (vision_tower is not None or not _is_published(values.get("mm_vision_tower"))):
        values = {**values, "vision_config": read_tower_config(tower_folder(values, vision_tower, allow_pickle=False, weights=False))}
    config = LlavaConfig.from_dict(values)
    if not config.vision_config.has_cls:
        config.vision_feature_select_strategy = "full"  # nothing is dropped, which transformers calls so
    return config


def fit_tower_depth(config: LlavaConfig, names: Iterable[str]) -> None:
    """Take a SigLIP's last layer out of the config where, of these tensors, that layer alone is missing.

    LLaVA-NeXT's siglip_encoder.py deletes it and hands on the last state of the others, whether mm_vision_select_layer is -1 or -2.
    """
    depth, layout = config.vision_config.num_hidden_layers, original_layout(config.projector_depth)
    matches = (_TOWER_LAYER.match(target) for target in map(layout.target, names) if target is not None)
    stored = {int(match[1]) for match in matches if match is not None}
    if stored and stored == set(range(depth - 1)) and config.vision_feature_layer in (-1, -2):
        config.vision_config.num_hidden_layers = depth - 1
        config.vision_feature_layer = -1


def read_tower_config(folder: Path) -> dict[str, Any]:
    """Read what a tower's own config.json says, or that of a whole CLIP or SigLIP. Raises: CheckpointError."""
    values = read_json(folder / "config.json")
    part = values.get("vision_config", values)
    stated = values.get("model_type")
    kind = part.get("model_type", _WHOLE_TOWERS.get(str(stated))) if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in TOWERS:
        raise CheckpointError(f"{folder} holds a {stated!r}, which is no tower; {', '.join((*_WHOLE_TOWERS, *TOWERS))} are read")
    return {**(_CLIP_DEFAULTS if kind == ClipVisionConfig.model_type else {}), **part, "model_type": kind}


def original_processor(folder: Path, config: LlavaConfig, template: ChatTemplate | None, *, tokenizer: Path) -> LlavaProcessor:
    """Build the processor of an original folder, as build_processor does. Raises: CheckpointError."""
    stated = config.to_dict()
    images = default_images(config, stated.get("image_aspect_ratio"))
    processor = build_processor(load_tokenizer(tokenizer), config, images, template_of_checkpoint(folder, named=template).template)
    if not stated.get("mm_use_im_start_end"):
        return processor
    if missing := [mark for mark in _MARKS if processor.tokenizer.find_token(mark) is None]:
        raise CheckpointError(f"{folder} puts tokens around pictures (mm_use_im_start_end), its tokenizer lacks {' and '.join(missing)}")
    return replace(processor, image_marks=_MARKS)


def build_processor(
    words: LlamaTokenizer | LlamaTokenizerFast, config: LlavaConfig, images: ImageProcessor, template: ChatTemplate
) -> LlavaProcessor:
    """Put a processor together, and give config the id of its <image> token, which comes after the tokenizer's.

    That id may lie beyond the embedding: no prompt looks it up. So may that of <pad>, which is added where there is no pad token.
    """
    words.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    index = words.find_token(IMAGE_TOKEN)
    assert index is not None, "it was just added"
    config.image_token_index = index
    if words.pad_token_id is None:
        words.add_special_tokens({"pad_token": "<pad>"})
    vision = config.vision_config
    return LlavaProcessor(
        tokenizer=words,
        image_processor=images,
        template=template,
        image_token_id=index,
        patch_size=vision.patch_size,
        keep_cls=config.vision_feature_select_strategy == "full",
        has_cls=vision.has_cls,
    )


def default_images(config: LlavaConfig, ratio: object) -> ImageProcessor:
    """Build the image processor that an image_aspect_ratio means for a tower. Raises: CheckpointError."""
    side, is_siglip = config.vision_config.image_size, not config.vision_config.has_cls
    aspect = _ASPECTS.get("" if ratio is None else str(ratio))
    if aspect is None:
        raise CheckpointError(f"config.json states image_aspect_ratio={ratio!r}; supported are {', '.join(filter(None, _ASPECTS))}")
    if aspect == "crop" and is_siglip:
        aspect = "stretch"
    pinpoints = tuple((width, height) for height, width in config.image_grid_pinpoints) if isinstance(config, LlavaNextConfig) else ()
    images = ImageProcessor(size_px=side, crop_px=side, aspect=aspect, pinpoints=pinpoints)
    if is_siglip:
        images = replace(images, mean=_HALF, std=_HALF)
    return images if config.merge is None else replace(images, merge=config.merge, is_rounded=False)


def _is_published(name: object) -> bool:
    if not isinstance(name, str):
        return name is None
    try:
        published_tower(name)
    except ConfigError:
        return False
    return True


def write_original(
    model: LlavaCore | LlamaCore,
    folder: Path,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterator[tuple[str, Tensor]],
    *,
    processor: object,
    source: Path,
    max_shard_bytes: int,
) -> None:
    """Write original LLaVA's layout, with the tower in it: config.json, weights that come one by one, the tokenizer's files.

    Raises: ConfigError where that layout cannot say what the model is.
    """
    assert isinstance(model, LlavaCore)
    assert isinstance(processor, LlavaProcessor)
    layout = original_layout(model.config.projector_depth)
    names = {name: _file_name(layout, name) for name, _ in model.named_parameters()}
    specs = {names[name]: (dtypes[name], tuple(weight.shape)) for name, weight in model.named_parameters()}
    num_rows = model.config.text_config.vocab_size
    tokenizer = _tokenizer_without(processor, num_rows)
    pad = tokenizer.pad_token_id
    values = {
        **_config_values(model.config, processor),
        "pad_token_id": pad if pad is not None and pad < num_rows else None,  # the processor's own <pad> has no row
        "torch_dtype": common_dtype_name(dtypes.values()),
    }
    write_json(folder / "config.json", values)
    write_tensors(folder, specs, ((names[name], tensor) for name, tensor in tensors), max_shard_bytes=max_shard_bytes)
    tokenizer.save_pretrained(folder)
    told = template_of_checkpoint(folder)
    if trained_template(told) != trained_template(replace(told, template=processor.template)):
        write_json(folder / "processor_config.json", {TEMPLATE_KEY: processor.template.name})  # original LLaVA takes it from --version
    if (source / GENERATION_NAME).is_file():
        given = read_json(source / GENERATION_NAME)
        kept = values["pad_token_id"] if "pad_token_id" in given else None
        write_json(folder / GENERATION_NAME, given if kept is None else {**given, "pad_token_id": kept})
    copy_licences(source, folder)


def _file_name(layout: Layout, name: str) -> str:
    found = layout.source(name)
    assert found is not None, "the layout names every tensor of ours"
    return found


def _config_values(config: LlavaConfig, processor: LlavaProcessor) -> dict[str, Any]:
    """Write the flat form; the tower lies in the folder, so original LLaVA has to take it from there."""
    values = config.to_original_dict()
    images, usual = processor.image_processor, default_images(config, None)
    if (images.mean, images.std) != (usual.mean, usual.std):
        raise ConfigError(
            f"original LLaVA's folders leave mean and std of pictures to the tower's kind, which are not {images.mean}, {images.std}"
        )
    is_padded = images.aspect == "pad" or processor.preprocessing_note is not None
    values.setdefault("image_aspect_ratio", "pad" if is_padded else None)
    kept = {name: value for name, value in values.items() if name not in WEIGHT_KEYS}
    return {**kept, "unfreeze_mm_vision_tower": True, "mm_use_im_start_end": processor.image_marks is not None}


def _tokenizer_without(processor: LlavaProcessor, num_rows: int) -> LlamaTokenizer | LlamaTokenizerFast:
    """Return the tokenizer without tokens that have no row, and without <image>, which original LLaVA cuts out of a text itself.

    Where tokens of the model's own come behind <image>, it stays, and keeps them in their places.
    """
    tokenizer = processor.tokenizer
    if not isinstance(tokenizer, LlamaTokenizer):
        assert isinstance(tokenizer, LlamaTokenizerFast)
        return tokenizer
    added = {index for index in tokenizer.added_tokens_decoder if index < num_rows}
    behind = {index for index in added if index > processor.image_token_id} - {tokenizer.pad_token_id}  # llava-hf's pad token is there
    most = num_rows if behind else min(num_rows, processor.image_token_id)
    kept = {index: token for index, token in tokenizer.added_tokens_decoder.items() if index < most}
    has_pad = tokenizer.pad_token_id is not None and tokenizer.pad_token_id in kept
    return LlamaTokenizer(
        tokenizer.model_file,
        added_tokens=kept,
        pad_token=tokenizer.pad_token if has_pad else tokenizer.unk_token,
        legacy=tokenizer.legacy,
        padding_side="right",
        model_max_length=tokenizer.model_max_length,
    )
