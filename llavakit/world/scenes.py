"""What a scene is and how one is drawn from a seed.

Owns: the vocabulary of the world, Thing, Scene, sampling, placing a scene inside a wider picture.
Refuses: pixels (render) and language (truth, questions).
Coordinates: centres are shares of the picture's width and height; a thing's height is a share of the shorter side.
Invariants: things do not overlap, and no centre lies on a border between the thirds of the picture, which the captions name
(inset keeps to that where it can); with held_out=False no colour-shape pair of HELD_OUT occurs.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "COLORS",
    "DIGITS",
    "HELD_OUT",
    "LETTERS",
    "MAX_THINGS",
    "SHAPES",
    "WORDS",
    "Backdrop",
    "Kind",
    "Panel",
    "Pattern",
    "Scene",
    "Thing",
    "draw_scene",
    "inset",
]

Kind = Literal["shape", "digit", "letter", "word"]

Pattern = Literal["plain", "gradient", "stripes", "checks", "noise"]

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
WORDS = (
    "CAT", "DOG", "SUN", "BUS", "CAR", "HAT", "CUP", "BOX", "FOX", "OWL", "PIG", "BEE", "SKY", "SEA", "TEA", "ICE",
    "KEY", "MAP", "NET", "OAK", "PEN", "RED", "TOY", "VAN", "WEB", "YES", "ZOO", "JAM", "GUM", "LIP", "NO", "GO",
    "UP", "ON", "EXIT", "STOP", "OPEN", "TAXI", "FISH", "BIRD",
)  # fmt: skip
HELD_OUT = frozenset(zip(COLORS, ("star", "ring", "triangle", "cross", "circle", "square", "triangle", "ring"), strict=True))
"""Colour-shape pairs that no training stage sees."""
MAX_THINGS = 8

_PATTERNS: tuple[Pattern, ...] = ("plain", "gradient", "stripes", "checks", "noise")
_GAP = 0.02
_CLEAR = 0.02
_TRIES = 60


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its name is a shape, a digit, a letter or a word."""

    kind: Kind
    name: str
    color: str
    x: float
    y: float
    height: float
    tint: tuple[int, int, int] = (0, 0, 0)
    """Small offset of the colour, so that no two reds are quite the same."""

    @property
    def width(self) -> float:
        """Width as a share of the picture's shorter side."""
        if self.kind == "shape":
            return self.height
        return self.height * (6 * len(self.name) - 1) / 7


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A background: two colours, a pattern and its seed."""

    pattern: Pattern
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    seed: int


@dataclass(frozen=True, slots=True)
class Panel:
    """Where a scene lies inside a wider picture, in shares of width and height."""

    left: float
    top: float
    right: float
    bottom: float
    backdrop: Backdrop


@dataclass(frozen=True, slots=True)
class Scene:
    """Things on a backdrop, in a picture whose width is aspect times its height."""

    things: tuple[Thing, ...]
    backdrop: Backdrop
    aspect: float = 1.0
    panel: Panel | None = None

    def box(self, thing: Thing) -> tuple[float, float, float, float]:
        """Return (x0, y0, x1, y1) of a thing in shares of width and height."""
        half_w = thing.width / 2 * min(1.0, 1 / self.aspect)
        half_h = thing.height / 2 * min(1.0, self.aspect)
        return thing.x - half_w, thing.y - half_h, thing.x + half_w, thing.y + half_h


def draw_scene(rng: random.Random, *, aspect: float = 1.0, held_out: bool = False) -> Scene:
    """Draw one scene; held_out=True puts at least one pair of HELD_OUT into it."""
    while True:
        things = _draw_things(rng, aspect, held_out=held_out)
        if things:
            return Scene(things, _draw_backdrop(rng), aspect)


def inset(rng: random.Random, scene: Scene, aspect: float) -> Scene:
    """Place a whole scene inside a wider picture (aspect > the scene's), at full height, somewhere along its width."""
    share = scene.aspect / aspect
    for _ in range(_TRIES):
        left = rng.uniform(0.0, 1.0 - share)
        if all(_is_clear(left + thing.x * share) for thing in scene.things):
            break
    things = tuple(dataclasses.replace(thing, x=left + thing.x * share) for thing in scene.things)
    return Scene(things, _draw_backdrop(rng), aspect, Panel(left, 0.0, left + share, 1.0, scene.backdrop))


def _draw_things(rng: random.Random, aspect: float, *, held_out: bool) -> tuple[Thing, ...]:
    count = rng.randint(1, MAX_THINGS)
    sizes = (0.20, 0.25, 0.33) if count <= 3 else (0.19, 0.23, 0.27) if count <= 5 else (0.18, 0.20, 0.23)
    things: list[Thing] = []
    for index in range(count):
        kind, name = _draw_name(rng, may_be_word=not any(thing.kind == "word" for thing in things))
        color = rng.choice(COLORS)
        if held_out and index == 0:
            kind, (color, name) = "shape", rng.choice(sorted(HELD_OUT))
        elif not held_out and kind == "shape":
            while (color, name) in HELD_OUT:
                color, name = rng.choice(COLORS), rng.choice(SHAPES)
        height = rng.choice(sizes) * rng.uniform(0.94, 1.06)
        if kind == "word":
            height = min(height, 0.2)
        tint = (rng.randint(-14, 14), rng.randint(-14, 14), rng.randint(-14, 14))
        placed = _place(rng, Thing(kind, name, color, 0.0, 0.0, height, tint), things, aspect)
        if placed is not None:
            things.append(placed)
    return tuple(things)


def _draw_name(rng: random.Random, *, may_be_word: bool) -> tuple[Kind, str]:
    roll = rng.random()
    if roll < 0.64:
        return "shape", rng.choice(SHAPES)
    if roll < 0.78:
        return "digit", rng.choice(DIGITS)
    if roll < 0.90 or not may_be_word:
        return "letter", rng.choice(LETTERS)
    return "word", rng.choice(WORDS)


def _place(rng: random.Random, thing: Thing, others: list[Thing], aspect: float) -> Thing | None:
    scale_x, scale_y = min(1.0, 1 / aspect), min(1.0, aspect)
    half_w, half_h = thing.width / 2 * scale_x, thing.height / 2 * scale_y
    if half_w >= 0.48:
        return None
    for _ in range(_TRIES):
        x, y = rng.uniform(half_w + 0.01, 0.99 - half_w), rng.uniform(half_h + 0.01, 0.99 - half_h)
        is_free = all(
            abs(x - other.x) > half_w + other.width / 2 * scale_x + _GAP or abs(y - other.y) > half_h + other.height / 2 * scale_y + _GAP
            for other in others
        )
        if is_free and _is_clear(x) and _is_clear(y):
            return dataclasses.replace(thing, x=x, y=y)
    return None


def _is_clear(center: float) -> bool:
    return abs(center - 1 / 3) > _CLEAR and abs(center - 2 / 3) > _CLEAR


def _draw_backdrop(rng: random.Random) -> Backdrop:
    first = _draw_tone(rng)
    shift = rng.randint(-22, 22)
    second = (first[0] + shift, first[1] + shift, first[2] + shift)
    pattern = rng.choice(_PATTERNS)
    return Backdrop(pattern, first, second, rng.getrandbits(31))


def _draw_tone(rng: random.Random) -> tuple[int, int, int]:
    grey = rng.randint(105, 160)
    return grey + rng.randint(-18, 18), grey + rng.randint(-18, 18), grey + rng.randint(-18, 18)
