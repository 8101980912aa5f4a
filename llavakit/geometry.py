"""Integer arithmetic of pictures: how many tiles and tokens a picture is, and where resize, crop and pad put its pixels.

Owns: the only counter of image tokens. Refuses: pixels and tensors. Sizes are (width, height) as in PIL.
Sources: CLIPImageProcessor (shortest edge, centre crop), LLaVA's expand2square (pad) and anyres (LLaVA-1.6), see docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "AnyresGrid",
    "CropBox",
    "ImageGrid",
    "MergeType",
    "anyres_grid",
    "best_resolution",
    "center_crop_box",
    "fit_size",
    "kept_box",
    "num_image_tokens",
    "num_tiles",
    "pad_offset",
    "patch_grid",
    "shortest_edge_size",
]

MergeType = Literal["flat", "spatial", "spatial_unpad"]
"""How the features of a picture's tiles are put together: tile after tile; as one area after the base tile; the same without what
padding produced, each row ended by a newline feature."""


@dataclass(frozen=True, slots=True)
class AnyresGrid:
    """How a picture of any size was cut: tile_rows x tile_cols tiles after one base tile."""

    tile_rows: int
    tile_cols: int
    width: int
    """Of the original picture, in pixels."""
    height: int
    merge: MergeType = "spatial_unpad"
    has_newline: bool = True
    """Whether each row (or a single tile) is followed by a newline feature; only with spatial_unpad."""
    is_rounded: bool = True
    """Whether the size without padding is rounded to seven places before it is cut off (transformers) or just cut off (original)."""


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """The image tokens of one picture: rows x cols patches a tile, and the class token where the checkpoint keeps it."""

    rows: int
    cols: int
    has_cls: bool = False
    anyres: AnyresGrid | None = None
    """None for a picture that is one tile."""


@dataclass(frozen=True, slots=True)
class CropBox:
    """A box in pixels; it may reach outside the picture, where pixels are zero."""

    left: int
    top: int
    right: int
    bottom: int


def num_image_tokens(grid: ImageGrid) -> int:
    """Count the positions that a picture takes in the prompt."""
    per_tile = grid.rows * grid.cols + int(grid.has_cls)
    if grid.anyres is None:
        return per_tile
    if grid.anyres.merge != "spatial_unpad":
        return per_tile * num_tiles(grid)
    if num_tiles(grid) == 1:
        return per_tile + int(grid.anyres.has_newline)
    box = kept_box(grid)
    rows, cols = box.bottom - box.top, box.right - box.left
    return per_tile + rows * (cols + int(grid.anyres.has_newline))


def num_tiles(grid: ImageGrid) -> int:
    """Count the tiles that the tower sees of a picture."""
    return 1 if grid.anyres is None else 1 + grid.anyres.tile_rows * grid.anyres.tile_cols


def kept_box(grid: ImageGrid) -> CropBox:
    """Return which patches of the tiles' whole area show the picture and not its padding (LLaVA's unpad_image)."""
    anyres = grid.anyres
    assert anyres is not None
    rows, cols = anyres.tile_rows * grid.rows, anyres.tile_cols * grid.cols
    if anyres.width / anyres.height > cols / rows:
        margin = (rows - _cut_off(anyres.height * (cols / anyres.width), is_rounded=anyres.is_rounded)) // 2
        return CropBox(0, margin, cols, rows - margin)
    margin = (cols - _cut_off(anyres.width * (rows / anyres.height), is_rounded=anyres.is_rounded)) // 2
    return CropBox(margin, 0, cols - margin, rows)


def _cut_off(size: float, *, is_rounded: bool) -> int:
    return int(round(size, 7)) if is_rounded else int(size)


def anyres_grid(
    size: tuple[int, int],
    pinpoints: Sequence[tuple[int, int]],
    tile: ImageGrid,
    tile_px: int,
    *,
    merge: MergeType = "spatial_unpad",
    has_newline: bool = True,
    is_rounded: bool = True,
) -> ImageGrid:
    """Decide how a picture of this size is cut into tiles of tile_px; pinpoints are (width, height) in the checkpoint's order."""
    width, height = best_resolution(size, pinpoints)
    anyres = AnyresGrid(height // tile_px, width // tile_px, *size, merge, merge == "spatial_unpad" and has_newline, is_rounded)
    return ImageGrid(tile.rows, tile.cols, tile.has_cls, anyres)


def best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the pinpoint that shows most of the picture's pixels, then the one that wastes least, then the first of the list."""
    width, height = size
    best, best_key = pinpoints[0], (-1, 0)
    for wide, high in pinpoints:
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        key = (shown, shown - wide * high)
        if key > best_key:
            best, best_key = (wide, high), key
    return best


def fit_size(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """Scale a size to fill the room in one direction and fit in the other, rounded up."""
    scale_w, scale_h = room[0] / size[0], room[1] / size[1]
    if scale_w < scale_h:
        return room[0], min(math.ceil(size[1] * scale_w), room[1])
    return min(math.ceil(size[0] * scale_h), room[0]), room[1]


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
