"""Merging the features of tiles: each way against the original's reshaping, position by position."""

import pytest
import torch
from torch import Tensor

from llavakit.geometry import AnyresGrid, ImageGrid, MergeType, num_image_tokens, num_tiles
from llavakit.model.anyres import merge_tiles

SIDE, WIDTH = 4, 3
NEWLINE = torch.full((WIDTH,), -1.0)


def draw(grid: ImageGrid) -> Tensor:
    return torch.arange(num_tiles(grid) * SIDE * SIDE * WIDTH, dtype=torch.float32).reshape(num_tiles(grid), SIDE * SIDE, WIDTH)


def grid_of(merge: MergeType, size: tuple[int, int] = (8, 8), *, rows: int = 2, cols: int = 3, newline: bool = True) -> ImageGrid:
    return ImageGrid(SIDE, SIDE, anyres=AnyresGrid(rows, cols, *size, merge, has_newline=newline and merge == "spatial_unpad"))


def original(features: Tensor, grid: ImageGrid) -> Tensor:
    """The original's steps for spatial merges: view, permute, cut, append, flatten."""
    anyres = grid.anyres
    assert anyres is not None
    tiles = features[1:].view(anyres.tile_rows, anyres.tile_cols, SIDE, SIDE, WIDTH)
    if anyres.merge == "spatial":
        return torch.cat((features[0], tiles.permute(0, 2, 1, 3, 4).contiguous().flatten(0, 3)))
    area = tiles.permute(4, 0, 2, 1, 3).contiguous().flatten(1, 2).flatten(2, 3)
    height, width = area.shape[1:]
    if anyres.width / anyres.height > width / height:
        padding = (height - int(anyres.height * width / anyres.width)) // 2
        area = area[:, padding : height - padding]
    else:
        padding = (width - int(anyres.width * height / anyres.height)) // 2
        area = area[:, :, padding : width - padding]
    if anyres.has_newline:
        area = torch.cat((area, NEWLINE[:, None, None].expand(WIDTH, area.shape[1], 1)), -1)
    return torch.cat((features[0], area.flatten(1, 2).transpose(0, 1)))


@pytest.mark.parametrize("size", [(8, 8), (30, 7), (7, 30), (100, 1), (1, 100), (12, 8)])
@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
@pytest.mark.parametrize("newline", [True, False])
def test_areas_are_put_together_as_the_original_does(merge: MergeType, size: tuple[int, int], newline: bool) -> None:
    grid = grid_of(merge, size, newline=newline)
    merged = merge_tiles(draw(grid), grid, NEWLINE)
    assert torch.equal(merged, original(draw(grid), grid))
    assert merged.shape[0] == num_image_tokens(grid)


def test_flat_features_follow_one_another() -> None:
    grid = grid_of("flat")
    assert torch.equal(merge_tiles(draw(grid), grid, None), draw(grid).flatten(0, 1))


@pytest.mark.parametrize("newline", [True, False])
def test_a_single_tile_gets_one_newline(newline: bool) -> None:
    grid = grid_of("spatial_unpad", rows=0, cols=0, newline=newline)
    merged = merge_tiles(draw(grid), grid, NEWLINE)
    assert merged.shape[0] == num_image_tokens(grid) == SIDE * SIDE + int(newline)
    assert torch.equal(merged[: SIDE * SIDE], draw(grid)[0])
    assert torch.equal(merged[SIDE * SIDE :], NEWLINE.expand(int(newline), -1))
