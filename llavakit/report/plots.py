"""Small plots as PNG bytes, drawn with Pillow alone.

Owns: line_plot and bar_plot with axes, ticks and a legend. Refuses: anything a real plotting library is needed for.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

__all__ = ["Series", "bar_plot", "line_plot"]

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 36, 52
_INK, _GRID, _PAPER = (40, 40, 40), (222, 222, 222), (255, 255, 255)
_COLORS = ((31, 90, 180), (210, 90, 30), (30, 140, 80), (150, 60, 150), (120, 120, 40))


@dataclass(frozen=True, slots=True)
class Series:
    """One named line of (x, y) points."""

    name: str
    points: tuple[tuple[float, float], ...]


def line_plot(series: Sequence[Series], *, title: str, x_label: str, y_label: str) -> bytes:
    """Draw lines over common axes; points that are not finite are left out."""
    points = [point for line in series for point in line.points if math.isfinite(point[1])]
    x_range, y_range = _extent([x for x, _ in points]), _extent([y for _, y in points])
    image, draw = _canvas(title, x_label, y_label)
    _ticks(draw, x_range, y_range)
    for line, color in zip(series, _cycle(len(series)), strict=True):
        path = [_place(x, y, x_range, y_range) for x, y in line.points if math.isfinite(y)]
        if len(path) > 1:
            draw.line(path, fill=color, width=2)
    for row, (line, color) in enumerate(zip(series, _cycle(len(series)), strict=True)):
        draw.text((_WIDTH - _RIGHT - 120, _TOP + 4 + 14 * row), line.name, fill=color)
    return _png(image)


def bar_plot(bars: Sequence[tuple[str, float]], *, title: str, y_label: str) -> bytes:
    """Draw one bar per (name, value), from zero."""
    y_range = _extent([0.0, *(value for _, value in bars)])
    image, draw = _canvas(title, "", y_label)
    _ticks(draw, None, y_range)
    pitch = (_WIDTH - _LEFT - _RIGHT) / max(1, len(bars))
    for index, (name, value) in enumerate(bars):
        left = _LEFT + pitch * (index + 0.15)
        (_, top), (_, bottom) = _place(0, max(value, 0.0), (0, 1), y_range), _place(0, min(value, 0.0), (0, 1), y_range)
        draw.rectangle((left, top, left + 0.7 * pitch, bottom), fill=_COLORS[0])
        draw.text((left, _HEIGHT - _BOTTOM + 6), name, fill=_INK)
    return _png(image)


def _canvas(title: str, x_label: str, y_label: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, 10), title, fill=_INK)
    draw.text((_WIDTH // 2, _HEIGHT - 18), x_label, fill=_INK)
    draw.text((6, _TOP - 16), y_label, fill=_INK)
    return image, draw


def _ticks(draw: ImageDraw.ImageDraw, x_range: tuple[float, float] | None, y_range: tuple[float, float]) -> None:
    for step in range(6):
        value = y_range[0] + (y_range[1] - y_range[0]) * step / 5
        _, y = _place(0, value, (0, 1), y_range)
        draw.line((_LEFT, y, _WIDTH - _RIGHT, y), fill=_GRID)
        draw.text((8, y - 6), f"{value:.4g}", fill=_INK)
        if x_range is not None:
            value = x_range[0] + (x_range[1] - x_range[0]) * step / 5
            x, _ = _place(value, 0, x_range, (0, 1))
            draw.text((x - 12, _HEIGHT - _BOTTOM + 6), f"{value:.4g}", fill=_INK)
    draw.line((_LEFT, _TOP, _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM), fill=_INK)


def _place(x: float, y: float, x_range: tuple[float, float], y_range: tuple[float, float]) -> tuple[float, float]:
    right = (x - x_range[0]) / (x_range[1] - x_range[0])
    up = (y - y_range[0]) / (y_range[1] - y_range[0])
    return _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
