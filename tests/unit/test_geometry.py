"""The arithmetic of pictures, against worked cases and its own laws."""

import functools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.geometry import (
    CropBox,
    ImageGrid,
    MergeType,
    anyres_grid,
    best_resolution,
    center_crop_box,
    fit_size,
    kept_box,
    num_image_tokens,
    num_tiles,
    pad_offset,
    patch_grid,
    shortest_edge_size,
)

SIDES = st.integers(1, 4000)


@pytest.mark.parametrize(
    ("image_px", "patch_px", "has_cls", "expected"),
    [(336, 14, False, 576), (336, 14, True, 577), (224, 14, False, 256), (128, 16, False, 64), (30, 7, False, 16), (7, 7, True, 2)],
)
def test_image_tokens_of_known_towers(image_px: int, patch_px: int, has_cls: bool, expected: int) -> None:
    assert num_image_tokens(patch_grid(image_px, patch_px, has_cls=has_cls)) == expected


def test_a_grid_need_not_be_square() -> None:
    assert num_image_tokens(ImageGrid(2, 3)) == 6


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [
        ((640, 480), 336, (448, 336)),
        ((480, 640), 336, (336, 448)),
        ((500, 333), 336, (504, 336)),
        ((7, 7), 336, (336, 336)),
        ((3, 1000), 2, (2, 666)),
    ],
)
def test_the_longer_side_is_truncated(size: tuple[int, int], edge: int, expected: tuple[int, int]) -> None:
    assert shortest_edge_size(*size, edge) == expected


@given(SIDES, SIDES, st.integers(1, 500))
def test_the_shorter_side_becomes_the_edge(width: int, height: int, edge: int) -> None:
    found = shortest_edge_size(width, height, edge)
    assert min(found) == edge
    assert (found[0] < found[1]) <= (width < height)


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ((448, 336), 336, CropBox(56, 0, 392, 336)),
        ((337, 336), 336, CropBox(0, 0, 336, 336)),
        ((335, 336), 336, CropBox(-1, 0, 335, 336)),
        ((10, 10), 15, CropBox(-3, -3, 12, 12)),
    ],
)
def test_the_crop_lies_in_the_middle(size: tuple[int, int], crop: int, expected: CropBox) -> None:
    assert center_crop_box(*size, crop) == expected


@given(SIDES, SIDES, st.integers(1, 500))
def test_the_crop_is_a_square_whose_margins_differ_by_one_at_most(width: int, height: int, crop: int) -> None:
    box = center_crop_box(width, height, crop)
    assert (box.right - box.left, box.bottom - box.top) == (crop, crop)
    assert abs(box.left - (width - box.right)) <= 1
    assert abs(box.top - (height - box.bottom)) <= 1


@given(SIDES, SIDES)
def test_padding_centres_the_picture(width: int, height: int) -> None:
    left, top = pad_offset(width, height)
    assert min(left, top) == 0
    assert max(width, height) - width - 2 * left in (0, 1)
    assert max(width, height) - height - 2 * top in (0, 1)


# LLaVA-1.6: pinpoints as (width, height), in the order of the original's and of transformers' files.
ORIGINAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TRANSFORMERS = tuple((width, height) for height, width in ORIGINAL)
TILE = patch_grid(336, 14)
ANY_SIDE = st.integers(1, 2000)


@pytest.mark.parametrize(
    ("size", "original", "transformers"),
    [
        ((300, 300), (336, 672), (672, 336)),  # all pinpoints show it whole: the first of the least wasteful wins
        ((1000, 1000), (672, 672), (672, 672)),
        ((640, 480), (672, 672), (672, 672)),
        ((2000, 500), (1008, 336), (1008, 336)),
        ((500, 2000), (336, 1008), (336, 1008)),
        ((1, 2000), (336, 672), (672, 336)),  # nothing of it is a whole pixel wide anywhere
    ],
)
def test_the_best_resolution_and_who_wins_ties(size: tuple[int, int], original: tuple[int, int], transformers: tuple[int, int]) -> None:
    assert best_resolution(size, ORIGINAL) == original
    assert best_resolution(size, TRANSFORMERS) == transformers


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((672, 672), 576 + 48 * 49),
        ((640, 480), 576 + 36 * 49),
        ((2000, 500), 576 + 18 * 73),
        ((500, 2000), 576 + 72 * 19),
        ((300, 300), 576 + 24 * 25),
    ],
)
def test_tokens_of_pictures_of_many_sizes(size: tuple[int, int], expected: int) -> None:
    assert num_image_tokens(anyres_grid(size, TRANSFORMERS, TILE, 336)) == expected


@pytest.mark.parametrize(("merge", "expected"), [("flat", 5 * 576), ("spatial", 5 * 576), ("spatial_unpad", 576 + 36 * 49)])
def test_tokens_depend_on_how_tiles_are_merged(merge: MergeType, expected: int) -> None:
    grid = anyres_grid((640, 480), ORIGINAL, TILE, 336, merge=merge)
    assert (num_tiles(grid), num_image_tokens(grid)) == (5, expected)


@given(ANY_SIDE, ANY_SIDE)
def test_counts_equal_transformers_for_any_size(width: int, height: int) -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    pinpoints = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in ORIGINAL])
    unpadded = functools.partial(LlavaNextProcessor._get_unpadded_features, None)
    counter = SimpleNamespace(image_processor=pinpoints, _get_unpadded_features=unpadded, **settings)
    best_height, best_width = select_best_resolution((height, width), [list(pair) for pair in ORIGINAL])
    assert best_resolution((width, height), TRANSFORMERS) == (best_width, best_height)
    grid = anyres_grid((width, height), TRANSFORMERS, TILE, 336)
    # transformers counts the class token too, and takes it off later.
    assert num_image_tokens(grid) + 1 == LlavaNextProcessor._get_number_of_features(counter, height, width, 336, 336)


@given(ANY_SIDE, ANY_SIDE)
def test_what_is_kept_lies_in_the_middle_and_both_roundings_agree(width: int, height: int) -> None:
    boxes = [kept_box(anyres_grid((width, height), TRANSFORMERS, TILE, 336, is_rounded=is_rounded)) for is_rounded in (True, False)]
    grid = anyres_grid((width, height), TRANSFORMERS, TILE, 336)
    assert grid.anyres is not None
    rows, cols = grid.anyres.tile_rows * 24, grid.anyres.tile_cols * 24
    box = boxes[0]
    assert (box.left, box.top) == (cols - box.right, rows - box.bottom)
    assert min(box.left, box.top) == 0
    assert boxes[0] == boxes[1]


@given(ANY_SIDE, ANY_SIDE)
def test_a_picture_fills_its_room_in_one_direction(width: int, height: int) -> None:
    room = best_resolution((width, height), ORIGINAL)
    fitted = fit_size((width, height), room)
    assert fitted[0] == room[0] or fitted[1] == room[1]
    assert 1 <= fitted[0] <= room[0]
    assert 1 <= fitted[1] <= room[1]
