"""The examination as a stage: ask, tabulate, write the report.

Owns: which conditions are examined on how many scenes; scores.json, replies.jsonl (every question with its reply) and report.html.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from llavakit.engine.llm import LLM
from llavakit.report.pages import Page
from llavakit.reproduce.examination import Condition, Mark, Score, examine, prior_scores, scores
from llavakit.storage.documents import write_json
from llavakit.world.questions import KINDS
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene

__all__ = ["write_examination"]

_SHARES: Mapping[Condition, float] = {"plain": 0.6, "held_out": 0.4, "jpeg": 0.2, "wide": 0.2, "shuffled": 0.1}
"""Scenes of each condition as a share of the number asked for; plain and held_out make up the unseen scenes."""
_BATCH = 128
_NUM_SHOWN = 6


def write_examination(model: Path, out: Path, scratch: Path, *, num_scenes: int, curves: Mapping[str, Path]) -> None:
    """Examine a checkpoint and write scores, replies and report; curves names the loss pictures to show."""
    llm = LLM(model, dtype="float32", device="cpu", max_batch=_BATCH)
    scenes = {condition: max(1, round(share * num_scenes)) for condition, share in _SHARES.items()}
    marks = examine(llm, scenes, scratch / "replies.sqlite")
    table = scores(marks) | {"prior": prior_scores([mark for mark in marks if mark.condition == "shuffled"])}
    values = {condition: {kind: _score_values(score) for kind, score in kinds.items()} for condition, kinds in table.items()}
    write_json(out / "scores.json", {"scenes": scenes, "threads": torch.get_num_threads(), "accuracy": values})
    replies = "".join(json.dumps(asdict(mark), ensure_ascii=False) + "\n" for mark in marks)
    (out / "replies.jsonl").write_text(replies, encoding="utf-8")
    page = Page("How well the miniature answers")
    page.paragraph(
        f"Accuracy in percent with 95 % intervals; scenes per condition: {', '.join(f'{name} {count}' for name, count in scenes.items())}. "
        "shuffled shows another scene's picture; prior is the share of each kind's most common answer."
    )
    conditions = list(table)
    page.table(("question", *conditions), [(kind, *(_cell(table[name].get(kind)) for name in conditions)) for kind in ("all", *KINDS)])
    _show_replies(page, marks)
    page.heading("Loss curves")
    for name, path in curves.items():
        page.paragraph(name)
        page.picture(path.read_bytes(), f"loss of stage {name}")
    (out / "report.html").write_text(page.to_html(), encoding="utf-8")


def _show_replies(page: Page, marks: Sequence[Mark]) -> None:
    page.heading("Wrong replies")
    wrong = [mark for mark in marks if not mark.is_right and mark.condition in ("plain", "held_out")]
    chosen = random.Random(0).sample(wrong, min(len(wrong), 3 * _NUM_SHOWN))
    page.table(("kind", "question", "expected", "reply"), [(mark.kind, mark.question, mark.key, mark.reply) for mark in chosen])
    page.heading("What the pictures look like")
    for index in range(_NUM_SHOWN):
        page.picture(to_png(render(draw_scene(random.Random(index)), 256, 256)), f"scene {index}")


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{100 * score.right / score.total:.1f} ({100 * score.interval.low:.1f}-{100 * score.interval.high:.1f})"


def _score_values(score: Score) -> dict[str, float]:
    return {
        "right": score.right,
        "total": score.total,
        "accuracy": round(score.right / score.total, 4),
        "low": round(score.interval.low, 4),
        "high": round(score.interval.high, 4),
    }
