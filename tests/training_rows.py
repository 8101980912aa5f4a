"""Small sets of rows for training runs: pictures of scenes, questions about them, and answers that a tiny model can learn.

Owns: write_rows. Every answer is the same few words, so a model that learned anything gives them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene

__all__ = ["ANSWER", "write_rows"]

ANSWER = "two blue squares"
_QUESTIONS = ("what is there?", "is there a green star?", "how many things?", "a red circle, and what else?")


def write_rows(folder: Path, count: int, *, seed: int = 0) -> tuple[Path, Path]:
    """Write rows.json and a folder of pictures; every third row is text alone, every fifth has two turns. Returns both paths."""
    rng, pictures = random.Random(seed), folder / "pictures"
    pictures.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        has_picture = number % 3 != 2
        turns = []
        for turn in range(1 + (number % 5 == 0)):
            mark = "<image>\n" if has_picture and turn == 0 else ""
            turns += [{"from": "human", "value": mark + rng.choice(_QUESTIONS)}, {"from": "gpt", "value": ANSWER}]
        rows.append({"id": str(number), "conversations": turns})
        if has_picture:
            rows[-1]["image"] = f"{number}.png"
            (pictures / f"{number}.png").write_bytes(to_png(render(draw_scene(rng), 64, 48)))
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json", pictures
