"""From a picture to the tiles that the tower sees.

Owns: ImageProcessor, equal bit for bit to CLIPImageProcessor's PIL path, and to LLaVA's padding. Refuses: bytes (decode).
Invariant: padding never builds the padded square.
Legend: S side in pixels
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llavakit.errors import CheckpointError, ImageError
from llavakit.geometry import (
    ImageGrid,
    MergeType,
    anyres_grid,
    best_resolution,
    center_crop_box,
    fit_size,
    pad_offset,
    shortest_edge_size,
)
from llavakit.processing.decode import DEFAULT_LIMITS

__all__ = ["Aspect", "ImageProcessor", "read_pinpoints"]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LEAST_STD = 1e-6
_CLIP_SIZE = 224  # CLIPImageProcessor's default where a file names none
_RESCALE = 0.00392156862745098
_MAX_ANYRES = 8192
_STRIP_PIXELS = 1 << 20


Aspect = Literal["crop", "pad", "stretch", "anyres"]
"""How a picture becomes square: the middle square; extended in the mean colour; resized without its proportions (SigLIP);
cut into several tiles after a stretched one (LLaVA-1.6)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """Turn a picture into normalised square tiles: one, or several with aspect anyres."""

    size_px: int = 336
    """Length of the shorter side after resizing."""
    crop_px: int = 336
    """Side of a tile."""
    aspect: Aspect = "crop"
    """How a picture becomes square."""
    mean: tuple[float, float, float] = _CLIP_MEAN
    """Subtracted per channel, pixels in 0..1."""
    std: tuple[float, float, float] = _CLIP_STD
    """Divided by per channel."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """anyres: the (width, height) sizes to choose from; earlier ones win ties."""
    merge: MergeType = "spatial_unpad"
    """anyres: how the tiles' features are put together."""
    is_rounded: bool = True
    """anyres: see geometry.AnyresGrid."""

    def grid(self, size: tuple[int, int], tile: ImageGrid) -> ImageGrid:
        """Return the image tokens of an upright picture of (width, height), given those of one tile."""
        if self.aspect != "anyres":
            return tile
        return anyres_grid(size, self.pinpoints, tile, self.crop_px, merge=self.merge, is_rounded=self.is_rounded)

    def apply(self, image: Image.Image) -> Tensor:
        """Return the float32 tiles [N, 3, crop_px, crop_px] of an RGB picture; N is num_tiles of its grid.

        Raises: ImageError for another mode. Sources: CLIPImageProcessor; LLaVA's expand2square and process_anyres_image.
        """
        if image.mode != "RGB" or min(image.size) < 1:
            raise ImageError(f"an RGB picture is needed, got {image.mode} of {image.width}x{image.height} pixels; use decode_image")
        match self.aspect:
            case "anyres":
                return torch.stack([self._tile(self._resized(part)) for part in self._parts(image)])
            case "pad" if image.width != image.height:
                return self._tile(self._resize_padded(image)).unsqueeze(0)
            case "stretch":
                return self._tile(image.resize((self.size_px, self.size_px), Image.Resampling.BICUBIC)).unsqueeze(0)
        return self._tile(self._resized(image)).unsqueeze(0)

    def _parts(self, image: Image.Image) -> list[Image.Image]:
        """Cut a picture for anyres: all of it, stretched, then the tiles of its best resolution, row by row, padded in black."""
        room = best_resolution(image.size, self.pinpoints)
        width, height = fit_size(image.size, room)
        canvas = Image.new("RGB", room)
        canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((room[0] - width) // 2, (room[1] - height) // 2))
        side = self.crop_px
        corners = [(left, top) for top in range(0, room[1], side) for left in range(0, room[0], side)]
        tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
        return [image.resize((self.size_px, self.size_px), Image.Resampling.BICUBIC), *tiles]

    def _resized(self, image: Image.Image) -> Image.Image:
        size = shortest_edge_size(image.width, image.height, self.size_px)
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    def _tile(self, image: Image.Image) -> Tensor:
        """Take the middle square and normalise it; returns [3, crop_px, crop_px]."""
        box = center_crop_box(image.width, image.height, self.crop_px)
        pixels_SS3 = np.asarray(image.crop((box.left, box.top, box.right, box.bottom)))  # outside the picture crop gives zeros
        channels = [table[pixels_SS3[:, :, channel]] for channel, table in enumerate(self._tables())]
        return torch.from_numpy(np.stack(channels))

    def _resize_padded(self, image: Image.Image) -> Image.Image:
        """Pad to a square and resize it, without ever building the square.

        Pillow resizes rows first and then columns, so strips of rows can be padded and resized on their own; padding rows keep
        their colour. A picture of 1x8192 pixels so needs 8 MB, not 200.
        """
        side, (left, top) = max(image.size), pad_offset(*image.size)
        red, green, blue = (int(value * 255) for value in self.mean)
        narrow = Image.new("RGB", (self.size_px, side), (red, green, blue))
        strip_px = max(_STRIP_PIXELS // side, 1)
        for start in range(0, image.height, strip_px):
            stop = min(start + strip_px, image.height)
            strip = Image.new("RGB", (side, stop - start), (red, green, blue))
            strip.paste(image.crop((0, start, image.width, stop)), (left, 0))
            narrow.paste(strip.resize((self.size_px, stop - start), Image.Resampling.BICUBIC), (0, top + start))
        return narrow.resize((self.size_px, self.size_px), Image.Resampling.BICUBIC)

    def _tables(self) -> list[np.ndarray]:
        """Look-up tables from a byte to its normalised float32, rounded step by step as the original code does."""
        scaled = (np.arange(256, dtype=np.float64) * _RESCALE).astype(np.float32)
        return [(scaled - np.float32(mean)) / np.float32(std) for mean, std in zip(self.mean, self.std, strict=True)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageProcessor:
        """Read preprocessor_config.json, or the "image_processor" of a processor_config.json.

        Raises: CheckpointError where it asks for something else than CLIP's or SigLIP's steps.
        """
        values = {name: value for name, value in values.items() if value is not None}
        for name, expected in _FIXED.items():
            if values.get(name, expected) != expected:
                raise CheckpointError(f"the image processor has {name}={values[name]!r}; only {expected!r} is supported")
        pinpoints = values.get("image_grid_pinpoints")
        is_siglip = "Siglip" in str(values.get("image_processor_type", ""))
        crops = values.get("do_center_crop", not is_siglip)
        if not isinstance(crops, bool):
            raise CheckpointError(f"the image processor has do_center_crop={crops!r}; true or false is supported")
        is_padded = values.get("do_pad") is True and pinpoints is None
        is_stretched = not crops and pinpoints is None and not is_padded
        size = values.get("size")
        is_square = pinpoints is not None and isinstance(size, Mapping) and set(size) == {"height", "width"}
        side = _stretched_side(values) if is_stretched or is_square else _side(values, "size")
        one_tile: Aspect = "pad" if is_padded else "stretch" if is_stretched else "crop"
        crop = side if is_stretched or not crops else _side(values, "crop_size")
        chosen = () if pinpoints is None else read_pinpoints(pinpoints)
        if any(length % crop for pair in chosen for length in pair):
            raise CheckpointError(f"image_grid_pinpoints must be multiples of the tile's side {crop}, got {pinpoints!r}")
        half = (0.5, 0.5, 0.5)
        return cls(
            size_px=side,
            crop_px=crop,
            aspect=one_tile if pinpoints is None else "anyres",
            mean=_triple(values, "image_mean", half if is_siglip else _CLIP_MEAN, least=0),
            std=_triple(values, "image_std", half if is_siglip else _CLIP_STD, least=_LEAST_STD),
            pinpoints=chosen,
        )

    def to_dict(self) -> dict[str, Any]:
        """Write preprocessor_config.json as transformers reads it; pinpoints are (H, W).

        Padding is LlavaImageProcessor's do_pad, which versions before that class do not know: without a class's name they take
        CLIPImageProcessor, which crops, and later ones the right one by the model's type.
        """
        is_next = self.aspect == "anyres"
        size = {"height": self.size_px, "width": self.size_px} if self.aspect == "stretch" else {"shortest_edge": self.size_px}
        crop = {} if self.aspect == "stretch" else {"crop_size": {"height": self.crop_px, "width": self.crop_px}}
        return {
            **({} if self.aspect == "pad" else {"image_processor_type": _TYPES[self.aspect]}),
            "processor_class": "LlavaNextProcessor" if is_next else "LlavaProcessor",
            **({"do_pad": True} if self.aspect in ("pad", "anyres") else {}),
            **_FIXED,
            "do_center_crop": self.aspect != "stretch",
            "size": size,
            **crop,
            **({"image_grid_pinpoints": [[height, width] for width, height in self.pinpoints]} if is_next else {}),
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }


_TYPES: Mapping[Aspect, str] = {
    "crop": "CLIPImageProcessor",
    "stretch": "SiglipImageProcessor",
    "anyres": "LlavaNextImageProcessor",
}
"""The classes of transformers that do the same."""
_FIXED: Mapping[str, Any] = {
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": _RESCALE,
    "do_normalize": True,
}
"""Settings that a checkpoint may state in one way only; absent ones have these values."""


def read_pinpoints(value: object, *, is_width_first: bool = False) -> tuple[tuple[int, int], ...]:
    """Read image_grid_pinpoints: a list of pairs, or that list as text; (height, width) as transformers writes, or the original's order.

    Returns (width, height) pairs in the file's order, which decides ties. Raises: CheckpointError.
    """
    try:
        listed: Any = json.loads(value.replace("(", "[").replace(")", "]")) if isinstance(value, str) else value
        pairs = [(first, second) for first, second in listed]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"image_grid_pinpoints must be pairs of numbers, got {value!r}") from error
    is_side = (isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= _MAX_ANYRES for pair in pairs for side in pair)
    if not pairs or not all(is_side):
        raise CheckpointError(f"image_grid_pinpoints must be pairs of numbers from 1 to {_MAX_ANYRES}, got {value!r}")
    return tuple(pair if is_width_first else (pair[1], pair[0]) for pair in pairs)


def _stretched_side(values: Mapping[str, Any]) -> int:
    """Read the size of a processor that does not crop: both sides must be the same."""
    entry = values.get("size", {"height": _CLIP_SIZE, "width": _CLIP_SIZE})
    if isinstance(entry, Mapping) and set(entry) == {"height", "width"} and entry["height"] == entry["width"]:
        entry = entry["height"]
    if isinstance(entry, bool) or not isinstance(entry, int) or not 1 <= entry <= DEFAULT_LIMITS.max_side:
        raise CheckpointError(f"the image processor does not crop and has size={values.get('size')!r}; a square is supported")
    return entry


def _side(values: Mapping[str, Any], name: str) -> int:
    """Read a length written as an int, {"shortest_edge": n} or {"height": n, "width": n}."""
    entry = values.get(name, _CLIP_SIZE)
    if isinstance(entry, Mapping):
        first, *others = entry.values() or (None,)
        is_known = set(entry) in ({"shortest_edge"}, {"height", "width"}) if name == "crop_size" else set(entry) == {"shortest_edge"}
        entry = first if is_known and all(length == first for length in others) else None
    if isinstance(entry, bool) or not isinstance(entry, int) or not 1 <= entry <= DEFAULT_LIMITS.max_side:
        raise CheckpointError(f"the image processor has {name}={values[name]!r}; a side from 1 to {DEFAULT_LIMITS.max_side} is supported")
    return entry


def _triple(values: Mapping[str, Any], name: str, default: tuple[float, float, float], *, least: float) -> tuple[float, float, float]:
    """Read three numbers from least to 1, which is white."""
    try:
        red, green, blue = (float(value) for value in values.get(name, default))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the image processor has {name}={values[name]!r}; three numbers are needed") from error
    if not all(least <= value <= 1 for value in (red, green, blue)):
        raise CheckpointError(f"the image processor has {name}={values[name]!r}; numbers from {least} to 1 are needed")
    return red, green, blue
