"""Putting the features of a picture's tiles together (LLaVA-1.6).

Owns: merge_tiles, the only place where features are cut and ordered as geometry counts them.
Sources: LLaVA's prepare_inputs_labels_for_multimodal (flat, spatial, spatial_unpad); transformers' pack_image_features.
Legend: N tiles  P patches a tile  D model width  F features of the picture
"""

from __future__ import annotations

import torch
from torch import Tensor

from llavakit.geometry import ImageGrid, kept_box, num_tiles

__all__ = ["merge_tiles"]


def merge_tiles(features_NPD: Tensor, grid: ImageGrid, newline_D: Tensor | None) -> Tensor:
    """Order one picture's features as features_FD, F = num_image_tokens(grid); the base tile comes first.

    newline_D is the learned feature at the end of each row, needed where the grid has them.
    """
    anyres = grid.anyres
    if anyres is None or anyres.merge == "flat":
        return features_NPD.flatten(0, 1)
    base_PD = features_NPD[0]
    if num_tiles(grid) == 1:
        return base_PD if not anyres.has_newline else torch.cat((base_PD, _newlines(newline_D, base_PD, 1)))
    tiles = features_NPD[1:].unflatten(1, (grid.rows, grid.cols)).unflatten(0, (anyres.tile_rows, anyres.tile_cols))
    area_RCD = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    if anyres.merge == "spatial":
        return torch.cat((base_PD, area_RCD.flatten(0, 1)))
    box = kept_box(grid)
    area_RCD = area_RCD[box.top : box.bottom, box.left : box.right]
    if anyres.has_newline:
        ends_R1D = _newlines(newline_D, area_RCD, area_RCD.shape[0]).unsqueeze(1)
        area_RCD = torch.cat((area_RCD, ends_R1D), 1)
    return torch.cat((base_PD, area_RCD.flatten(0, 1)))


def _newlines(newline_D: Tensor | None, like: Tensor, count: int) -> Tensor:
    assert newline_D is not None, "a grid with newlines needs a model that has learned them"
    return newline_D.to(like).expand(count, -1)
