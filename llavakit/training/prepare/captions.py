"""Captions for stage 1: COCO's, and those of CC3M or any other set of captioned pictures.

Owns: coco_rows, captioned_rows. Each picture becomes one row: a request for a short caption, drawn from a few, and the caption.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.training.prepare.concepts import Concepts, balanced
from llavakit.training.prepare.published import LeftOut, Row, listed, read_published, row_or_none, talk
from llavakit.training.rows import open_rows

__all__ = ["captioned_rows", "coco_rows"]

_REQUESTS = (
    "Caption this picture.", "What does the picture show?", "Say in one sentence what is to be seen here.", "Sum the picture up.",
    "Describe the picture in a few words.", "Give the picture a short caption.", "What is this a picture of?",
    "Briefly tell what the photo is about.", "Write one line about this picture.", "Put what you see into a short sentence.",
    "Give a brief description of the image.",
)  # fmt: skip
_CAPTIONS = ("caption", "blip_caption", "text")


def coco_rows(file: Path, *, seed: int = 0) -> Iterator[Row | LeftOut]:
    """Read captions_train2017.json or its like: of each picture one of its captions. Raises: DataError."""
    table = read_published(file)
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    for note in listed(table, "annotations", file):
        captions[note["image_id"]].append(str(note["caption"]).strip())
    for image in listed(table, "images", file):
        rng = random.Random(f"{seed}/{image['id']}")
        if known := [caption for caption in captions[image["id"]] if caption]:
            yield talk(str(image["id"]), image["file_name"], [(rng.choice(_REQUESTS), rng.choice(known))])
        else:
            yield LeftOut("without a caption")


def captioned_rows(file: Path, concepts: Concepts | None, *, seed: int = 0) -> Iterator[Row | LeftOut]:
    """Read captioned pictures, and keep those that balance their concepts, or all where concepts is None.

    file is CC3M's own table (.tsv: a caption, then an address or a name; pictures of addresses are GCC_train_NUMBER.jpg, as LLaVA has
    them), or .json or .jsonl whose rows have image and caption. Raises: DataError.
    """
    pairs = list(_table(file) if file.suffix == ".tsv" else _table_of_rows(file))
    known = [(image, caption) for image, caption in pairs if image and caption]
    yield from (LeftOut("without a caption or a picture's name") for _ in range(len(pairs) - len(known)))
    chosen = range(len(known)) if concepts is None else balanced([caption for _, caption in known], concepts, seed=seed)
    yield from (LeftOut("passed over for the balance of concepts") for _ in range(len(known) - len(chosen)))
    for number in chosen:
        image, caption = known[number]
        yield talk(Path(image).stem, image, [(random.Random(f"{seed}/{image}").choice(_REQUESTS), caption)])


def _table(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(filter(str.strip, lines)):
                caption, place = (*line.rstrip("\r\n").split("\t"), "", "")[:2]
                yield (f"GCC_train_{number:09d}.jpg" if "://" in place else place.strip()), caption.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _table_of_rows(file: Path) -> Iterator[tuple[str, str]]:
    rows = open_rows(file)
    for number in range(len(rows)):
        row = row_or_none(rows, number)
        values = row if isinstance(row, dict) else {}
        image = values.get("image")
        caption = next((text for key in _CAPTIONS if isinstance(text := values.get(key), str)), _answer(values))
        yield image if isinstance(image, str) else "", caption.strip()


def _answer(row: dict[str, Any]) -> str:
    """Return the first answer of a row in LLaVA's form, as its own stage 1 has them."""
    turns = row.get("conversations")
    listed_turns = turns if isinstance(turns, list) else []
    answers = [turn.get("value") for turn in listed_turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
    return answers[0] if answers and isinstance(answers[0], str) else ""
