"""What is true of a scene, in the form that the data engine reads: captions and labelled boxes, never pixels.

Owns: labels, regions of a picture, the reading order of things, captions.
Boxes are (x0, y0, x1, y1) in shares of the picture's width and height, as in the paper's instruction data.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llavakit.world.scenes import Kind, Scene

__all__ = ["REGIONS", "LabeledBox", "Truth", "captions", "listing", "place_of", "scene_truth"]

REGIONS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
_EDGE_MARGIN = 0.035


@dataclass(frozen=True, slots=True)
class LabeledBox:
    """One thing: its colour, what it is ("circle", "letter A"), and where."""

    color: str
    kind: Kind
    name: str
    box: tuple[float, float, float, float]

    @property
    def noun(self) -> str:
        """The thing without its colour: "circle", "digit 7", "letter A", "word CAT"."""
        return self.name if self.kind == "shape" else f"{self.kind} {self.name}"

    @property
    def label(self) -> str:
        """Colour and noun, with the article: "an orange letter A"."""
        return f"{'an' if self.color == 'orange' else 'a'} {self.color} {self.noun}"

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) of the third of the picture that holds the centre."""
        x, y = self.center
        return min(2, int(3 * y)), min(2, int(3 * x))

    @property
    def region(self) -> str:
        """The name of that third: "top left", ..., "bottom right"."""
        row, col = self.cell
        return REGIONS[3 * row + col]

    @property
    def place(self) -> str:
        """The region as a phrase: "at the top left", "in the middle"."""
        return place_of(self.region)

    @property
    def is_clearly_placed(self) -> bool:
        """Whether the centre is far enough from the borders of the thirds to ask about its region."""
        return all(abs(value - edge) > _EDGE_MARGIN for value in self.center for edge in (1 / 3, 2 / 3))


@dataclass(frozen=True, slots=True)
class Truth:
    """All labelled boxes of a picture in reading order: by thirds from the top left, inside one from its top left corner on."""

    boxes: tuple[LabeledBox, ...]

    def where(self, **values: str) -> tuple[LabeledBox, ...]:
        """Select the boxes whose attributes have the given values."""
        return tuple(box for box in self.boxes if all(getattr(box, name) == value for name, value in values.items()))


def place_of(region: str) -> str:
    """Turn a region into a phrase: "at the top left", "in the middle"."""
    return f"{'in' if region == 'middle' else 'at'} the {region}"


def scene_truth(scene: Scene) -> Truth:
    """Write down a scene's labelled boxes."""
    boxes = (LabeledBox(thing.color, thing.kind, thing.name, scene.box(thing)) for thing in scene.things)
    return Truth(tuple(sorted(boxes, key=lambda box: (*box.cell, sum(box.center)))))


def listing(boxes: Iterable[LabeledBox]) -> str:
    """Name things with their places: "a red circle at the top left and a blue digit 7 at the right"."""
    return _join([f"{box.label} {box.place}" for box in boxes])


def _join(parts: Sequence[str]) -> str:
    """Join with commas and a final "and"."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def captions(truth: Truth, rng: random.Random) -> tuple[str, ...]:
    """Write the picture's captions: a full one with places, and shorter ones as people would."""
    labels = [box.label for box in truth.boxes]
    some = sorted(rng.sample(range(len(labels)), min(len(labels), rng.randint(1, 3))))
    return (
        f"{listing(truth.boxes)}.",
        f"a picture of {_join(labels)}.",
        f"a picture with {_join([labels[index] for index in some])}.",
    )
