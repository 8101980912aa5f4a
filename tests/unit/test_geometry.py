"""The arithmetic of pictures, against worked cases and its own laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.geometry import CropBox, ImageGrid, center_crop_box, num_image_tokens, pad_offset, patch_grid, shortest_edge_size

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
