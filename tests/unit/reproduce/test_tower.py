"""Dense targets of the tower."""

import numpy as np

from llavakit.reproduce.tower import dense_targets
from llavakit.world.scenes import COLORS, SHAPES, Backdrop, Scene, Thing

PLAIN = Backdrop("plain", (128, 128, 128), (128, 128, 128), 0)


def test_patches_on_a_thing_know_it() -> None:
    scene = Scene((Thing("shape", "star", "blue", 0.25, 0.75, 0.25),), PLAIN)
    targets = dense_targets(scene, (128, 128), 8)
    names = targets.names_P.reshape(8, 8)
    assert set(np.unique(names)) == {0, SHAPES.index("star") + 1}
    assert names[6, 2] > 0
    assert names[:4].sum() == 0
    assert set(np.unique(targets.colors_P)) == {-100, COLORS.index("blue")}
    assert targets.centers_P.sum() == 1


def test_boxes_are_relative_to_the_patch() -> None:
    scene = Scene((Thing("shape", "circle", "red", 0.5, 0.5, 0.25),), PLAIN)
    targets = dense_targets(scene, (128, 128), 8)
    patch = 4 * 8 + 4  # its centre lies at 0.5625
    expected = np.array([0.375, 0.375, 0.625, 0.625]) - 0.5625
    assert np.allclose(targets.boxes_P4[patch], expected, atol=1e-6)


def test_letters_of_a_word_are_told_apart_in_padded_pictures() -> None:
    scene = Scene((Thing("word", "GO", "white", 0.5, 0.5, 0.4),), PLAIN, aspect=2.0)
    names = dense_targets(scene, (256, 128), 8).names_P.reshape(8, 8)
    found = [name for name in names[4] if name > 0]
    assert len(set(found)) == 2
    assert names[:2].sum() == 0
    assert names[6:].sum() == 0
