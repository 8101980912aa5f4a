"""Conversations that are published as such: LLaVA-Instruct, and ShareGPT's without pictures.

Owns: instruct_rows, sharegpt_rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llavakit.errors import InputError
from llavakit.training.prepare.published import LeftOut, Row, coco_picture, row_or_none
from llavakit.training.rows import open_rows

__all__ = ["instruct_rows", "sharegpt_rows"]

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "chatgpt": "gpt", "bard": "gpt", "bing": "gpt"}


def instruct_rows(file: Path) -> Iterator[Row | LeftOut]:
    """Read llava_instruct_150k.json (158K rows), whose pictures are COCO's by name alone."""
    rows = open_rows(file)
    for number in range(len(rows)):
        row = row_or_none(rows, number)
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            yield LeftOut("of instruct without a picture's name")
            continue
        yield {**row, "id": f"instruct-{number}", "image": coco_picture(Path(row["image"]).stem.removeprefix("COCO_train2014_"))}


def sharegpt_rows(file: Path, num_tokens: Callable[[list[dict[str, str]]], int], *, most: int) -> Iterator[Row | LeftOut]:
    """Read conversations, each up to the last exchange with which it has at most so many tokens, as LLaVA cut them.

    As Vicuna did, speakers must take turns, and what begins with an answer loses it; an answer that would be cut is left out whole.
    """
    rows = open_rows(file)
    for number in range(len(rows)):
        turns = _turns(row_or_none(rows, number))
        if not turns:
            yield LeftOut("of sharegpt that are no exchanges")
            continue
        # How many exchanges fit: more of them never take fewer tokens.
        try:
            count = bisect.bisect_right(range(1, len(turns) // 2 + 1), most, key=lambda count: num_tokens(turns[: 2 * count]))
        except InputError:
            yield LeftOut("of sharegpt that no template can hold")
            continue
        kept = turns[: 2 * count]
        yield {"id": f"sharegpt-{number}", "conversations": kept} if kept else LeftOut(f"of sharegpt above {most} tokens")


def _turns(row: Any) -> list[dict[str, str]]:
    """Return whole exchanges; none where the speakers do not take turns."""
    found = row.get("conversations") if isinstance(row, dict) else None
    turns = []
    for turn in found if isinstance(found, list) else ():
        speaker = _SPEAKERS.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if speaker is None or not isinstance(turn.get("value"), str) or not turn["value"].strip():
            return []
        turns.append({"from": speaker, "value": turn["value"].strip()})
    if turns and turns[0]["from"] == "gpt":
        del turns[0]
    if any(turn["from"] != ("human", "gpt")[place % 2] for place, turn in enumerate(turns)):
        return []
    return turns[: len(turns) // 2 * 2]
