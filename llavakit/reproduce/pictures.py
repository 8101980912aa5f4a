"""Pictures as the miniature meets them: scenes in several sizes and shapes, some inside wider pictures, some as JPEG.

Owns: the mixture of sizes, aspects and encodings that every stage and the examination draw from.
Invariant: picture(seed) is a pure function.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from llavakit.processing.decode import decode_image
from llavakit.world.render import render, to_jpeg
from llavakit.world.scenes import Scene, draw_scene, inset

__all__ = ["Form", "Picture", "draw_picture"]

Form = Literal["square", "photo", "wide"]
"""square: the scene alone; photo: a 4:3 or 3:4 picture; wide: a square scene inside a wider picture."""

_SHORT_SIDES_PX = (128, 160, 192, 256)


@dataclass(frozen=True, slots=True)
class Picture:
    """A scene and its pixels."""

    scene: Scene
    image: Image.Image


def draw_picture(rng: random.Random, *, form: Form | None = None, short_side_px: int | None = None, held_out: bool = False) -> Picture:
    """Draw a scene and render it; form and size are drawn too unless they are given."""
    if form is None:
        form = rng.choices(("square", "photo", "wide"), (0.37, 0.25, 0.38))[0]
    if short_side_px is None:
        short_side_px = rng.choice(_SHORT_SIDES_PX)
    if form == "photo":
        aspect = rng.choice((4 / 3, 4 / 3, 3 / 2, 3 / 4))
        scene = draw_scene(rng, aspect=aspect, held_out=held_out)
    else:
        scene = draw_scene(rng, held_out=held_out)
        if form == "wide":
            scene = inset(rng, scene, rng.uniform(1.15, 1.8))
    width, height = short_side_px, short_side_px
    if scene.aspect > 1:
        width = round(height * scene.aspect)
    else:
        height = round(width / scene.aspect)
    image = render(scene, width, height)
    if rng.random() < 0.25:
        image = decode_image(to_jpeg(image, quality=rng.randint(70, 95)))
    return Picture(scene, image)
