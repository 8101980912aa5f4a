"""Turn a scene into pixels.

Owns: shapes, glyphs, backdrops. Invariant: the picture depends on the scene and the size alone.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from llavakit.world.glyphs import glyph_cells
from llavakit.world.scenes import Backdrop, Scene, Thing

__all__ = ["render", "to_jpeg", "to_png"]

_RGB = {
    "red": (212, 36, 36), "green": (38, 158, 52), "blue": (42, 78, 218), "yellow": (238, 214, 34),
    "purple": (142, 48, 172), "orange": (240, 132, 20), "white": (240, 240, 240), "black": (18, 18, 18),
}  # fmt: skip
_BOLD = 0.16  # each cell of a glyph spreads by this share, so that thin strokes survive the resize


def render(scene: Scene, width: int, height: int) -> Image.Image:
    """Draw a scene as an RGB picture; width / height should be the scene's aspect."""
    image = Image.fromarray(_backdrop_pixels(scene.backdrop, width, height))
    if scene.panel is not None:
        left, top = round(scene.panel.left * width), round(scene.panel.top * height)
        right, bottom = round(scene.panel.right * width), round(scene.panel.bottom * height)
        image.paste(Image.fromarray(_backdrop_pixels(scene.panel.backdrop, right - left, bottom - top)), (left, top))
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        x0, y0, x1, y1 = scene.box(thing)
        _draw_thing(draw, thing, (x0 * width, y0 * height, x1 * width, y1 * height))
    return image


def to_png(image: Image.Image) -> bytes:
    """Encode losslessly."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_jpeg(image: Image.Image, *, quality: int = 90) -> bytes:
    """Encode as cameras do."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _backdrop_pixels(backdrop: Backdrop, width: int, height: int) -> np.ndarray:
    first, second = np.array(backdrop.first, np.float32), np.array(backdrop.second, np.float32)
    cell = max(2, min(width, height) // (6 + backdrop.seed % 9))
    rows, cols = np.arange(height)[:, None], np.arange(width)[None, :]
    if backdrop.pattern == "plain":
        mix = np.zeros((height, width), np.float32)
    elif backdrop.pattern == "gradient":
        mix = ((rows / height + cols / width) / 2).astype(np.float32)
    elif backdrop.pattern == "stripes":
        mix = ((rows // cell if backdrop.seed & 16 else cols // cell) % 2 + np.zeros((height, width))).astype(np.float32)
    elif backdrop.pattern == "checks":
        mix = ((rows // cell + cols // cell) % 2).astype(np.float32)
    else:
        grain = np.random.default_rng(backdrop.seed).random((height // 2 + 1, width // 2 + 1), np.float32)
        mix = grain.repeat(2, 0).repeat(2, 1)[:height, :width]
    pixels = first + mix[:, :, None] * (second - first)
    return np.asarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, box: tuple[float, float, float, float]) -> None:
    red, green, blue = (min(255, max(0, base + shift)) for base, shift in zip(_RGB[thing.color], thing.tint, strict=True))
    fill = (red, green, blue)
    x0, y0, x1, y1 = box
    if thing.kind != "shape":
        _draw_text(draw, thing.name, box, fill)
        return
    width, height = x1 - x0, y1 - y0
    match thing.name:
        case "circle":
            draw.ellipse(box, fill=fill)
        case "square":
            draw.rectangle((x0 + 0.05 * width, y0 + 0.05 * height, x1 - 0.05 * width, y1 - 0.05 * height), fill=fill)
        case "triangle":
            draw.polygon([(x0 + width / 2, y0), (x1, y1), (x0, y1)], fill=fill)
        case "cross":
            draw.rectangle((x0 + 0.34 * width, y0, x1 - 0.34 * width, y1), fill=fill)
            draw.rectangle((x0, y0 + 0.34 * height, x1, y1 - 0.34 * height), fill=fill)
        case "ring":
            draw.ellipse(box, outline=fill, width=max(1, round(0.2 * width)))
        case _:
            draw.polygon(_star_points(x0, y0, width, height), fill=fill)


def _star_points(x0: float, y0: float, width: float, height: float) -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius, angle = (0.5 if corner % 2 == 0 else 0.21), math.pi * (corner / 5 - 0.5)
        points.append((x0 + width * (0.5 + radius * math.cos(angle)), y0 + height * (0.53 + radius * math.sin(angle))))
    return points


def _draw_text(draw: ImageDraw.ImageDraw, text: str, box: tuple[float, float, float, float], fill: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    cell_w, cell_h = (x1 - x0) / (6 * len(text) - 1), (y1 - y0) / 7
    for position, character in enumerate(text):
        for col, row in glyph_cells(character):
            left, top = x0 + (6 * position + col - _BOLD) * cell_w, y0 + (row - _BOLD) * cell_h
            right, bottom = left + (1 + 2 * _BOLD) * cell_w, top + (1 + 2 * _BOLD) * cell_h
            draw.rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), fill=fill)
