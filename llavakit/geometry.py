"""Integer arithmetic of pictures: how many tokens a picture is, and where resize, crop and pad put its pixels.

Owns: the only counter of image tokens. Refuses: pixels and tensors. Sizes are (width, height) as in PIL.
Sources: CLIPImageProcessor (shortest edge, centre crop) and LLaVA's expand2square (pad), see docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CropBox", "ImageGrid", "center_crop_box", "num_image_tokens", "pad_offset", "patch_grid", "shortest_edge_size"]


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """The image tokens of one picture: rows x cols patches, and the class token where the checkpoint keeps it."""

    rows: int
    cols: int
    has_cls: bool = False


@dataclass(frozen=True, slots=True)
class CropBox:
    """A box in pixels; it may reach outside the picture, where pixels are zero."""

    left: int
    top: int
    right: int
    bottom: int


def num_image_tokens(grid: ImageGrid) -> int:
    """Count the positions that a picture takes in the prompt."""
    return grid.rows * grid.cols + int(grid.has_cls)


def patch_grid(image_px: int, patch_px: int, *, has_cls: bool = False) -> ImageGrid:
    """Cut a square tile of image_px into patches; a remainder at the right and bottom is dropped, as CLIP's convolution does."""
    side = image_px // patch_px
    return ImageGrid(rows=side, cols=side, has_cls=has_cls)


def shortest_edge_size(width: int, height: int, edge_px: int) -> tuple[int, int]:
    """Scale so that the shorter side is edge_px; the longer one is truncated, not rounded (CLIPImageProcessor)."""
    if width <= height:
        return edge_px, int(edge_px * height / width)
    return int(edge_px * width / height), edge_px


def center_crop_box(width: int, height: int, crop_px: int) -> CropBox:
    """Place a square of crop_px in the middle: floor offsets inside, ceil offsets when the picture is smaller."""
    left, top = _crop_offset(width, crop_px), _crop_offset(height, crop_px)
    return CropBox(left, top, left + crop_px, top + crop_px)


def _crop_offset(size: int, crop_px: int) -> int:
    if size >= crop_px:
        return (size - crop_px) // 2
    return -((crop_px - size + 1) // 2)


def pad_offset(width: int, height: int) -> tuple[int, int]:
    """Where a picture lies on its square canvas of side max(width, height) (LLaVA's expand2square)."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2
