"""From the bytes of a picture to its pixels.

Owns: image_size and decode_image, the only places where pictures are opened, with their limits; picture digests.
Refuses: torch (a process that only decodes starts fast and small); files, URLs, animations, formats beyond JPEG, PNG, WebP, GIF and BMP.
Invariants: sizes are checked from the header before any pixel is decoded; no message holds text of a library. By default a picture is
decoded as people see it; faithful=True decodes as LLaVA's code does.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from llavakit.errors import AnimationError, ImageError

__all__ = ["DEFAULT_LIMITS", "SUFFIXES", "ImageLimits", "decode_image", "image_digest", "image_size"]

# Opened by class, not by Image.open: a JPEG with further pictures behind it (phones write them) is then its first picture,
# and the only size check is ours.
_KINDS: tuple[tuple[str, type[ImageFile.ImageFile], bytes], ...] = (
    ("JPEG", JpegImageFile, b"\xff\xd8\xff"),
    ("PNG", PngImageFile, b"\x89PNG\r\n\x1a\n"),
    ("WebP", WebPImageFile, b"RIFF"),
    ("GIF", GifImageFile, b"GIF8"),
    ("BMP", BmpImageFile, b"BM"),
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""How the names of files end that decode_image may open."""
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError, NotImplementedError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Warning,
)  # fmt: skip  # what Pillow's decoders raise on damaged files; warnings where an application makes errors of them
_MAX_JPEG_SCANS = 200  # encoders write about ten; each scan walks over the whole picture
_START_OF_SCAN = b"\xff\xda"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the picture upright
_LYING = (5, 6, 7, 8)  # orientations that swap width and height
_ORIENTATION_TAG, _SHORT = 0x0112, 3


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
    """Longer side over shorter side; thin pictures grow enormous when they are resized."""
    max_total_pixels: int = 1 << 25
    """Width times height summed over the pictures of one prompt."""


DEFAULT_LIMITS = ImageLimits()


def image_size(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, faithful: bool = False) -> tuple[int, int]:
    """Read width and height, as decode_image's picture has them, without decoding pixels. Raises: ImageError as decode_image."""
    _, image = _open(data, limits)
    is_lying = not faithful and _orientation(image.info.get("exif", b"")) in _LYING
    return (image.height, image.width) if is_lying else image.size


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, faithful: bool = False) -> Image.Image:
    """Decode JPEG, PNG, WebP, GIF or BMP bytes to RGB.

    By default EXIF rotation is applied, transparency lies on white, 16 bits are scaled to 8; faithful=True does none of it.
    Raises: ImageError when the bytes are no such picture, exceed a limit, are animated or damaged.
    """
    kind, image = _open(data, limits)
    try:
        image.load()
        return _as_stored(image) if faithful else _as_seen(image)
    except _DECODER_ERRORS as error:
        raise ImageError(f"the {kind} picture is damaged or incomplete; send it again") from error


def image_digest(image: Image.Image) -> str:
    """Hash mode, size and pixels: equal digests mean the same picture."""
    head = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def _open(data: bytes, limits: ImageLimits) -> tuple[str, ImageFile.ImageFile]:
    """Read the header and check everything that it says."""
    if len(data) > limits.max_bytes:
        raise ImageError(f"the picture has {len(data)} bytes, at most {limits.max_bytes} are allowed; compress it")
    kind, opener = _sniff(data)
    if kind == "WebP":  # its opener allocates the canvas
        _check_size(*_webp_size(data), limits)
    if kind == "JPEG" and data.count(_START_OF_SCAN) > _MAX_JPEG_SCANS:
        raise ImageError(f"the JPEG picture has more than {_MAX_JPEG_SCANS} scans; save it again as a plain JPEG")
    try:
        image = opener(io.BytesIO(data))
        is_animated = isinstance(image, GifImageFile | PngImageFile | WebPImageFile) and image.is_animated
    except _DECODER_ERRORS as error:
        raise ImageError(f"the {kind} picture has a damaged header; send it again") from error
    _check_size(image.width, image.height, limits)
    if is_animated:
        raise AnimationError("the picture is animated; send a single frame")
    return kind, image


def _sniff(data: bytes) -> tuple[str, type[ImageFile.ImageFile]]:
    for kind, opener, magic in _KINDS:
        if data.startswith(magic) and (kind != "WebP" or data[8:12] == b"WEBP"):
            return kind, opener
    raise ImageError("the data is not a JPEG, PNG, WebP, GIF or BMP picture")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read the canvas size of the three kinds of WebP (RFC 9649)."""
    chunk, head = data[12:16], data[20:30]
    if chunk == b"VP8X" and len(head) == 10:
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if chunk == b"VP8 " and len(head) == 10:
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    if chunk == b"VP8L" and len(head) == 10:
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    raise ImageError("the WebP picture has a damaged header; send it again")


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if min(width, height) < 1:
        raise ImageError(f"the picture is {width}x{height} pixels, at least 1x1 is needed")
    if max(width, height) > limits.max_side:
        raise ImageError(f"the picture is {width}x{height} pixels, a side may have at most {limits.max_side}; scale it down")
    if width * height > limits.max_pixels:
        raise ImageError(f"the picture is {width}x{height} pixels, at most {limits.max_pixels} pixels are allowed; scale it down")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(f"the picture is {width}x{height} pixels, its sides may differ by a factor of {limits.max_aspect:g}; crop it")


def _as_seen(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _as_stored(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)  # it is ignored, and Pillow would warn about it
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image.info.get("exif", b"")))
    return image if turn is None else image.transpose(turn)


def _orientation(exif: bytes) -> int:
    """Find tag 0x0112 in the first directory of EXIF data; damaged data says nothing (Pillow's reader would follow all of it)."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    start = int.from_bytes(tiff[4:8], order)
    num_entries = int.from_bytes(tiff[start : start + 2], order)
    for place in range(start + 2, min(start + 2 + 12 * num_entries, len(tiff) - 11), 12):
        entry = tiff[place : place + 12]
        if int.from_bytes(entry[:2], order) == _ORIENTATION_TAG and int.from_bytes(entry[2:4], order) == _SHORT:
            return int.from_bytes(entry[8:10], order)
    return 1


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale grey 0..65535 to 0..255; the one value that PNG may declare transparent is white."""
    grey = np.asarray(image).astype(np.int32)
    scaled = np.clip((grey + 128) // 257, 0, 255)
    seen = np.where(grey == image.info["transparency"], 255, scaled) if "transparency" in image.info else scaled
    return Image.fromarray(seen.astype(np.uint8)).convert("RGB")
