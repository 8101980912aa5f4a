"""Pictures spoilt on purpose, for mDPO's conditional preference.

Owns: spoilt_tiles. Invariants: a spoilt picture has the tiles and image tokens of the whole one; what is drawn depends on the generator
alone. Source of the crop and its shares: mDPO (arXiv 2406.11839); here a crop keeps the picture's proportions.
Legend: N tiles  S side in pixels
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from llavakit.processing.decode import decode_image
from llavakit.processing.processor import LlavaProcessor
from llavakit.training.preference_config import CorruptionConfig
from llavakit.types import ImagePart

__all__ = ["spoilt_tiles"]

_LEAST_SHARE = 0.01


def spoilt_tiles(
    tiles_N3SS: Tensor, parts: Sequence[ImagePart], processor: LlavaProcessor, config: CorruptionConfig, rng: random.Random
) -> Tensor:
    """Return what the tiles of these pictures become. Raises: ImageError."""
    match config.kind:
        case "blank":
            return torch.zeros_like(tiles_N3SS)  # tiles are normalised: the mean colour
        case "noise":
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            noise_N3SS = torch.randn(tiles_N3SS.shape, generator=generator)
            return math.sqrt(1 - config.noise_share) * tiles_N3SS + math.sqrt(config.noise_share) * noise_N3SS
        case "crop":
            images = [decode_image(part.data, processor.limits, faithful=processor.is_faithful) for part in parts]
            return torch.cat([processor.image_processor.apply(_cropped(image, config.crop_share, rng)) for image in images])


def _cropped(image: Image.Image, most_share: float, rng: random.Random) -> Image.Image:
    """Enlarge a part of a picture, drawn by area and place, to the picture's size."""
    scale = math.sqrt(rng.uniform(_LEAST_SHARE, most_share))
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
