"""The pictures of a batch, in every form that callers of forward and generate use, as tiles with their grids.

Owns: Pictures and gather. Forms: [N, 3, S, S], one tile a picture; [N, most tiles, 3, S, S] filled up at the end (transformers);
a list of [3, S, S] or [tiles, 3, S, S] (original LLaVA); with sizes for models that cut pictures by their size (v1.6).
Legend: N pictures  S side in pixels
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.errors import InputError
from llavakit.geometry import AnyresGrid, ImageGrid, anyres_grid, num_image_tokens, num_tiles
from llavakit.model.llava_config import LlavaConfig, LlavaNextConfig

__all__ = ["Pictures", "gather"]


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Tiles of all pictures in order, and how they belong to pictures."""

    tiles_N3SS: Tensor
    grids: tuple[ImageGrid, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Positions that each picture takes."""
        return tuple(map(num_image_tokens, self.grids))

    def split(self, counts: Sequence[int]) -> list[Pictures]:
        """Deal the pictures out, so many to each. Raises: InputError when that is not all of them."""
        if sum(counts) != len(self.grids):
            raise InputError(f"the prompts have places for {sum(counts)} pictures, got {len(self.grids)}")
        parts, first = [], 0
        tiles = self.tiles_N3SS.split([num_tiles(grid) for grid in self.grids])
        for count in counts:
            own = tiles[first : first + count]
            parts.append(Pictures(torch.cat(own) if own else self.tiles_N3SS[:0], self.grids[first : first + count]))
            first += count
        return parts


def gather(
    config: LlavaConfig,
    *,
    images: Tensor | Sequence[Tensor] | None = None,
    pixel_values: Tensor | Sequence[Tensor] | None = None,
    image_sizes: Tensor | Iterable[Sequence[int]] | None = None,
) -> Pictures | None:
    """Bring the pictures of a call into one form; None where there are none.

    image_sizes are the pictures' own sizes in pixels: (width, height) with images, as original LLaVA has them, and (height, width)
    with pixel_values, as transformers has them. Raises: InputError when both are given, or sizes are missing or do not fit.
    """
    if images is not None and pixel_values is not None:
        raise InputError("images and pixel_values are the same thing; give one of them")
    given = images if pixel_values is None else pixel_values
    if given is None:
        return None
    pictures = _per_picture(given)
    if not isinstance(config, LlavaNextConfig):
        return Pictures(_joined(pictures), tuple(_flat_grid(config, picture.shape[0]) for picture in pictures))
    if image_sizes is None:
        raise InputError("a LLaVA-1.6 model needs image_sizes, the pictures' own sizes, to know how their tiles belong together")
    pairs = [(int(first), int(second)) for first, second in (image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes)]
    sizes = pairs if pixel_values is None else [(width, height) for height, width in pairs]
    if not all(min(size) > 0 for size in sizes):
        raise InputError(f"image_sizes must be positive, got {pairs}")
    grids = tuple(_anyres_grid(config, size) for size in sizes)
    if isinstance(given, Tensor) and given.dim() == 4 and given.shape[0] == sum(map(num_tiles, grids)):
        return Pictures(given, grids)  # tiles end to end
    if len(pictures) != len(sizes):
        raise InputError(f"there are {len(pictures)} pictures and {len(sizes)} image_sizes; each picture has one size")
    for number, (picture, grid) in enumerate(zip(pictures, grids, strict=True)):
        if picture.shape[0] < num_tiles(grid):
            wanted = num_tiles(grid)
            raise InputError(f"picture {number} has {picture.shape[0]} tiles, its size asks for {wanted}; use the model's processor")
    return Pictures(_joined([picture[: num_tiles(grid)] for picture, grid in zip(pictures, grids, strict=True)]), grids)


def _per_picture(given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the tiles [tiles, 3, S, S] of each picture."""
    if isinstance(given, Tensor) and given.dim() not in (4, 5):
        raise InputError(f"pictures must be [N, 3, S, S] or [N, tiles, 3, S, S], got {list(given.shape)}")
    pictures = [picture.unsqueeze(0) if picture.dim() == 3 else picture for picture in given]
    if not pictures:
        raise InputError("pictures must hold at least one picture, got none; leave the argument out for text alone")
    for picture in pictures:
        if picture.dim() != 4:
            raise InputError(f"a picture must be [3, S, S] or [tiles, 3, S, S], got {list(picture.shape)}")
    return pictures


def _joined(pictures: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(shapes) > 1:
        raise InputError(f"all tiles must have one shape, got {sorted(shapes)}; use the model's processor")
    return torch.cat(list(pictures))


def _flat_grid(config: LlavaConfig, count: int) -> ImageGrid:
    """Return the grid of a picture whose tiles' features simply follow one another."""
    tile = config.image_grid
    if count == 1:
        return tile
    return ImageGrid(tile.rows, tile.cols, tile.has_cls, AnyresGrid(count - 1, 1, 1, 1, "flat", has_newline=False))


def _anyres_grid(config: LlavaNextConfig, size: tuple[int, int]) -> ImageGrid:
    assert config.merge is not None
    pinpoints = [(width, height) for height, width in config.image_grid_pinpoints]
    return anyres_grid(size, pinpoints, config.image_grid, config.vision_config.image_size, merge=config.merge)
