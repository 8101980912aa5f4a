"""Regions and their descriptions, either way: RefCOCO and Visual Genome.

Owns: refcoco_rows, genome_rows. Boxes are [left, top, right, bottom] as shares of the picture's square after padding, to two digits, as in
LLaVA-1.5's data (its issue 606), so a picture is to be padded. Sources: arXiv 2310.03744, table 7.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from llavakit.storage.plain_pickle import read_plain_pickle
from llavakit.training.prepare.published import LeftOut, Row, coco_picture, listed, read_published, talk

__all__ = ["genome_rows", "refcoco_rows"]

_DESCRIBE = "Please provide a short description for this region: {}."
_FIND = "Please provide the bounding box coordinate of the region this sentence describes: {}."
_MOST_TURNS, _MOST_REGIONS = 9, 10
Box = tuple[float, float, float, float]


def refcoco_rows(name: str, references: Path, instances: Path, *, seed: int) -> Iterator[Row | LeftOut]:
    """Read refs(....).p and instances.json; the regions of a picture come in conversations of less than ten exchanges."""
    table = read_published(instances)
    sizes = {image["id"]: (image["width"], image["height"]) for image in listed(table, "images", instances)}
    boxes = {note["id"]: note["bbox"] for note in listed(table, "annotations", instances)}
    regions: defaultdict[int, list[tuple[str, Box]]] = defaultdict(list)
    for reference in read_plain_pickle(references):
        if reference["split"] != "train":
            continue
        if reference["ann_id"] not in boxes or reference["image_id"] not in sizes:
            yield LeftOut(f"of {name} without a box")
            continue
        box = _square(boxes[reference["ann_id"]], sizes[reference["image_id"]])
        phrases = [_phrase(sentence["sent"]) for sentence in reference["sentences"]]
        regions[reference["image_id"]] += [(phrase, box) for phrase in phrases if phrase]
    for number, found in regions.items():
        for part, first in enumerate(range(0, len(found), _MOST_TURNS)):
            rng = random.Random(f"{seed}/{name}/{number}/{part}")
            yield talk(f"{name}-{number}-{part}", coco_picture(number), _exchanges(found[first : first + _MOST_TURNS], rng))


def genome_rows(descriptions: Path, pictures: Path, *, seed: int) -> Iterator[Row | LeftOut]:
    """Read region_descriptions.json and image_data.json; at most ten regions of a picture, drawn."""
    facts = {image["image_id"]: image for image in read_published(pictures, list)}
    for picture in read_published(descriptions, list):
        number, regions = picture["id"], [region for region in picture["regions"] if _phrase(region["phrase"])]
        if number not in facts or not regions:
            yield LeftOut("of vg without a size or a region")
            continue
        rng, size = random.Random(f"{seed}/vg/{number}"), (facts[number]["width"], facts[number]["height"])
        drawn = rng.sample(regions, min(_MOST_REGIONS, len(regions)))
        found = [
            (_phrase(region["phrase"]), _square((region["x"], region["y"], region["width"], region["height"]), size)) for region in drawn
        ]
        folder = PurePosixPath(facts[number]["url"]).parent.name  # VG_100K or VG_100K_2
        yield talk(f"vg-{number}", f"vg/{folder}/{number}.jpg", _exchanges(found, rng))


def _exchanges(regions: Sequence[tuple[str, Box]], rng: random.Random) -> list[tuple[str, str]]:
    exchanges = []
    for phrase, box in regions:
        is_described = rng.random() < 0.5
        exchanges.append((_DESCRIBE.format(list(box)), phrase) if is_described else (_FIND.format(phrase), str(list(box))))
    return exchanges


def _phrase(text: str) -> str:
    return text.strip().rstrip(".").strip()


def _square(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Turn left, top, width, height in pixels into shares of the padded square."""
    left, top, width, height = box
    side = max(size)
    across, down = (side - size[0]) / 2, (side - size[1]) / 2
    corners = ((left + across), (top + down), (left + width + across), (top + height + down))
    first, second, third, fourth = (round(min(max(corner / side, 0.0), 1.0), 2) for corner in corners)
    return first, second, third, fourth
