"""Pixels: the right colours at the right places, the same every time."""

import random

import numpy as np
import pytest

from llavakit.world.glyphs import GLYPH_COLS, GLYPH_ROWS, glyph_cells
from llavakit.world.render import render, to_jpeg, to_png
from llavakit.world.scenes import DIGITS, LETTERS, SHAPES, Backdrop, Scene, Thing, draw_scene

PLAIN = Backdrop("plain", (128, 128, 128), (128, 128, 128), 0)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])
def test_center_of_a_shape_has_its_color(shape: str) -> None:
    image = render(Scene((Thing("shape", shape, "red", 0.5, 0.5, 0.4),), PLAIN), 100, 100)
    red, green, blue = image.getpixel((50, 55))  # type: ignore[misc]
    assert red > 180
    assert max(green, blue) < 60


def test_ring_is_hollow() -> None:
    image = render(Scene((Thing("shape", "ring", "blue", 0.5, 0.5, 0.6),), PLAIN), 100, 100)
    assert image.getpixel((50, 50)) == (128, 128, 128)
    assert image.getpixel((50, 24)) != (128, 128, 128)


def test_nothing_is_drawn_outside_the_box() -> None:
    for seed in range(40):
        scene = draw_scene(random.Random(seed))
        bare = np.asarray(render(Scene((), scene.backdrop), 120, 120)).astype(int)
        changed = np.abs(np.asarray(render(scene, 120, 120)).astype(int) - bare).sum(2) > 0
        for thing in scene.things:
            x0, y0, x1, y1 = (round(edge * 120) for edge in scene.box(thing))
            changed[max(0, y0 - 2) : y1 + 3, max(0, x0 - 2) : x1 + 3] = False
        assert not changed.any(), seed


def test_every_glyph_is_its_own() -> None:
    cells = [glyph_cells(character) for character in (*DIGITS, *LETTERS)]
    assert len(set(cells)) == len(cells)
    assert all(0 <= col < GLYPH_COLS and 0 <= row < GLYPH_ROWS for glyph in cells for col, row in glyph)


def test_rendering_is_reproducible_in_both_encodings() -> None:
    scene = draw_scene(random.Random(11))
    assert to_png(render(scene, 96, 96)) == to_png(render(scene, 96, 96))
    assert to_jpeg(render(scene, 96, 96)) == to_jpeg(render(scene, 96, 96))
