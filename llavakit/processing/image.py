"""From the bytes of a picture to the tile that the tower sees.

Owns: decode_image, the only place where pictures are opened, with its limits; ImageProcessor, equal to CLIPImageProcessor's
PIL path bit for bit, and to LLaVA's padding; picture digests.
Invariants: sizes are checked from the header before any pixel is decoded; no intermediate exceeds four times max_pixels;
no message holds text of a library. By default a picture is decoded as people see it; faithful=True decodes as LLaVA's code does.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from llavakit.errors import CheckpointError, ImageError
from llavakit.geometry import center_crop_box, pad_offset, shortest_edge_size

__all__ = ["DEFAULT_LIMITS", "ImageLimits", "ImageProcessor", "decode_image", "image_digest"]

_MAGIC: tuple[tuple[str, int, bytes], ...] = (
    ("JPEG", 0, b"\xff\xd8\xff"), ("PNG", 0, b"\x89PNG\r\n\x1a\n"), ("WEBP", 8, b"WEBP"), ("GIF", 0, b"GIF8"), ("BMP", 0, b"BM"),
)  # fmt: skip
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError, NotImplementedError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip  # what Pillow's decoders raise on damaged files
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RESCALE = 0.00392156862745098


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What a picture may cost before it is refused."""

    max_bytes: int = 10 << 20
    """Encoded size."""
    max_pixels: int = 1 << 24
    """Width times height."""
    max_side: int = 8192
    """Width or height."""
    max_aspect: float = 64.0
    """Longer side over shorter side; thin pictures grow enormous when they are padded."""


DEFAULT_LIMITS = ImageLimits()


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, faithful: bool = False) -> Image.Image:
    """Decode JPEG, PNG, WebP, GIF or BMP bytes to RGB.

    By default EXIF rotation is applied, transparency lies on white, 16 bits are scaled to 8; faithful=True does none of it.
    Raises: ImageError when the bytes are no such picture, exceed a limit, are animated or damaged.
    """
    kind = _sniff(data, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except _DECODER_ERRORS as error:
        raise ImageError(f"the {kind} picture has a damaged header; send it again") from error
    _check_size(image.width, image.height, limits)
    if _is_animated(image):
        raise ImageError("the picture is animated; send a single frame")
    try:
        image.load()
        return image.convert("RGB") if faithful else _as_seen(image)
    except _DECODER_ERRORS as error:
        raise ImageError(f"the {kind} picture is damaged or incomplete; send it again") from error


def image_digest(image: Image.Image) -> str:
    """Hash mode, size and pixels: equal digests mean the same picture."""
    head = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """Resize, crop or pad, and normalise a picture into one square tile."""

    size_px: int = 336
    """Length of the shorter side after resizing."""
    crop_px: int = 336
    """Side of the tile."""
    aspect: Literal["crop", "pad"] = "crop"
    """crop takes the middle square; pad first extends the picture to a square in the mean colour."""
    mean: tuple[float, float, float] = _CLIP_MEAN
    """Subtracted per channel, pixels in 0..1."""
    std: tuple[float, float, float] = _CLIP_STD
    """Divided by per channel."""

    def apply(self, image: Image.Image) -> Tensor:
        """Return the float32 tile [3, crop_px, crop_px] of an RGB picture. Source: CLIPImageProcessor; LLaVA's expand2square."""
        if self.aspect == "pad" and image.width != image.height:
            image = self._pad_to_square(image)
        size = shortest_edge_size(image.width, image.height, self.size_px)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        box = center_crop_box(image.width, image.height, self.crop_px)
        pixels_SS3 = np.asarray(image.crop((box.left, box.top, box.right, box.bottom)))  # outside the picture crop gives zeros
        channels = [table[pixels_SS3[:, :, channel]] for channel, table in enumerate(self._tables())]
        return torch.from_numpy(np.stack(channels))

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        red, green, blue = (int(value * 255) for value in self.mean)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        canvas.paste(image, pad_offset(*image.size))
        return canvas

    def _tables(self) -> list[np.ndarray]:
        """Look-up tables from a byte to its normalised float32, rounded step by step as the original code does."""
        scaled = (np.arange(256, dtype=np.float64) * _RESCALE).astype(np.float32)
        return [(scaled - np.float32(mean)) / np.float32(std) for mean, std in zip(self.mean, self.std, strict=True)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageProcessor:
        """Read preprocessor_config.json. Raises: CheckpointError where it asks for something else than CLIP's steps."""
        try:
            size, crop = values.get("size", 336), values.get("crop_size", 336)
            size_px = int(size["shortest_edge"] if isinstance(size, Mapping) else size)
            crop_px = int(crop["height"] if isinstance(crop, Mapping) else crop)
            red, green, blue = (float(value) for value in values.get("image_mean", _CLIP_MEAN))
            stds = tuple(float(value) for value in values.get("image_std", _CLIP_STD))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the image processor's size, crop_size, image_mean or image_std is not readable: {error!r}") from error
        for name, expected in (
            ("do_resize", True),
            ("do_center_crop", True),
            ("do_normalize", True),
            ("resample", 3),
            ("rescale_factor", _RESCALE),
        ):
            if values.get(name, expected) != expected and not (name == "rescale_factor" and abs(values[name] * 255 - 1) < 1e-9):
                raise CheckpointError(f"the image processor has {name}={values[name]!r}; only {expected!r} is supported")
        aspect: Literal["crop", "pad"] = "pad" if values.get("do_pad") is True else "crop"
        return cls(size_px=size_px, crop_px=crop_px, aspect=aspect, mean=(red, green, blue), std=(stds[0], stds[1], stds[2]))

    def to_dict(self) -> dict[str, Any]:
        """Write preprocessor_config.json as transformers reads it; padding is LlavaImageProcessor's do_pad."""
        return {
            "image_processor_type": "LlavaImageProcessor" if self.aspect == "pad" else "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            **({"do_pad": True} if self.aspect == "pad" else {}),
            "do_resize": True,
            "size": {"shortest_edge": self.size_px},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": self.crop_px, "width": self.crop_px},
            "do_rescale": True,
            "rescale_factor": _RESCALE,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }


def _sniff(data: bytes, limits: ImageLimits) -> str:
    if len(data) > limits.max_bytes:
        raise ImageError(f"the picture has {len(data)} bytes, at most {limits.max_bytes} are allowed")
    for kind, offset, magic in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return kind
    raise ImageError("the data is not a JPEG, PNG, WebP, GIF or BMP picture")


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if min(width, height) < 1:
        raise ImageError(f"the picture is {width}x{height} pixels, at least 1x1 is needed")
    if max(width, height) > limits.max_side:
        raise ImageError(f"the picture is {width}x{height} pixels, a side may have at most {limits.max_side}; scale it down")
    if width * height > limits.max_pixels:
        raise ImageError(f"the picture is {width}x{height} pixels, at most {limits.max_pixels} pixels are allowed; scale it down")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(f"the picture is {width}x{height} pixels, its sides may differ by a factor of {limits.max_aspect:g}; crop it")


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))  # only the plug-ins of formats that can move have the attribute
    except _DECODER_ERRORS as error:
        raise ImageError("the picture has a damaged frame table; send it again") from error


def _as_seen(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I"):
        grey = np.clip(np.rint(np.asarray(image).astype(np.float64) / 257), 0, 255).astype(np.uint8)
        return Image.fromarray(grey, "L").convert("RGB")
    if image.mode == "F":
        raise ImageError("the picture has float pixels; convert it to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        return image  # damaged EXIF says nothing about the rotation
    return image if turned is None else turned
