"""A LLaVA before its training: a language model, a tower, and a new projector between them.

Owns: Fresh and what it means for config, processor and projector. Refuses: tiles (LLaVA-1.6), which come with a trained newline.
Sources: llava_arch.py (initialize_vision_modules), clip_encoder.py, multimodal_projector/builder.py and train.py of LLaVA. Stage 1 is
trained on captions (template plain) and pictures that the tower's own processor crops; every later stage pads them to a square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llavakit.checkpoint.layouts import LLAVA_HF
from llavakit.checkpoint.original import build_processor, default_images, read_tower_config
from llavakit.checkpoint.parts import Part
from llavakit.errors import CheckpointError
from llavakit.model.config import LlamaConfig
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.projector import MultiModalProjector
from llavakit.model.surgery import init_projector
from llavakit.processing.chat import TEMPLATES, ChatTemplate
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.documents import read_optional_json
from llavakit.storage.tensors import TensorSpec

__all__ = ["Fresh", "fresh_config", "fresh_processor", "fresh_projector"]

_IMAGES_NAME = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fresh:
    """What a LLaVA has that neither its language model nor its tower brings."""

    projector: str = "mlp2x_gelu"
    """linear (v1), mlpNx_gelu with N layers, or identity."""
    template: ChatTemplate = TEMPLATES["plain"]
    """How it will see conversations; plain is stage 1's."""
    seed: int = 0
    """Of the projector's weights."""


def fresh_config(text: LlamaConfig, tower: Path, fresh: Fresh) -> LlavaConfig:
    """Describe the LLaVA over a language model and a tower's folder: the last hidden state but one, without the class token.

    Raises: ConfigError, CheckpointError.
    """
    config = LlavaConfig.from_dict({
        "text_config": text.to_dict(),
        "vision_config": read_tower_config(tower),
        "image_token_index": None,
        "mm_projector_type": fresh.projector,
        "vision_feature_layer": -2,
        "tie_word_embeddings": text.tie_word_embeddings,
        "pad_token_id": text.pad_token_id,
    })  # fmt: skip
    config.vision_feature_select_strategy = "default" if config.vision_config.has_cls else "full"  # there is nothing to drop
    config.validate()
    return config


def fresh_processor(words: LlamaTokenizer | LlamaTokenizerFast, config: LlavaConfig, tower: Path, template: ChatTemplate) -> LlavaProcessor:
    """Build the processor of the language model's tokenizer and the tower's pictures, and give config the id of <image>.

    Raises: CheckpointError where the tower's files make other pictures than it takes, or the tokenizer lacks a token of the template.
    """
    stated, is_padded, side = read_optional_json(tower / _IMAGES_NAME), template.form != "caption", config.vision_config.image_size
    images = default_images(config, "pad" if is_padded else None)
    if stated:
        images = replace(ImageProcessor.from_dict(stated), aspect=images.aspect)
    if images.crop_px != side:
        raise CheckpointError(f"{tower / _IMAGES_NAME} makes pictures of {images.crop_px} pixels, the tower takes {side}")
    processor = build_processor(words, config, images, template)
    template.markers(processor.tokenizer, processor.image_token_id)
    return processor


def fresh_projector(config: LlavaConfig, dtype: torch.dtype, seed: int) -> Part:
    """Draw the projector's weights in float32, the same for the same seed, and cast them."""
    projector = MultiModalProjector(config)
    init_projector(projector, torch.Generator().manual_seed(seed))
    drawn = {f"multi_modal_projector.{name}": weight.detach().to(dtype) for name, weight in projector.named_parameters()}
    return Part(_Drawn(drawn), LLAVA_HF, None)


class _Drawn:
    """Tensors that lie in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        """Copy one tensor."""
        return self._tensors[name].clone()

    def place(self, name: str) -> None:
        """They lie in no file."""

    def in_file_order(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)
