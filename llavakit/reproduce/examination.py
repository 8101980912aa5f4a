"""The examination: accuracy of a miniature on unseen scenes, per kind of question, with intervals and controls.

Owns: the unseen scenes, their forms, grading, the controls (the same picture as a JPEG, inside a wider picture, another picture).
Invariant: questions and pictures depend on the seed alone; seeds of training never reach here.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llavakit.engine.llm import LLM
from llavakit.logs import logger
from llavakit.report.bootstrap import Interval, wilson_interval
from llavakit.reproduce.teacher import draw_questions
from llavakit.storage.journal import Journal
from llavakit.types import Conversation, SamplingParams
from llavakit.world.questions import KINDS, Question, is_right
from llavakit.world.render import render, to_jpeg, to_png
from llavakit.world.scenes import Scene, draw_scene, inset
from llavakit.world.truth import scene_truth

__all__ = ["Condition", "Mark", "Score", "examine", "prior_scores", "scores"]

Condition = Literal["plain", "held_out", "jpeg", "wide", "shuffled"]
"""How a scene is shown: plain as a square PNG, held_out with a colour-shape pair that no stage saw, jpeg as a 640x480 JPEG,
wide inside a wider picture, shuffled as another scene's picture."""

_LOG = logger("reproduce")
_FIRST_SEED = 1 << 60  # training draws its scenes from seeds far below
_SIDE_PX = 256
_QUESTIONS_PER_SCENE = 2
_MAX_TOKENS = 200
_BATCH = 128


@dataclass(frozen=True, slots=True)
class Mark:
    """One graded reply."""

    condition: Condition
    kind: str
    question: str
    key: str
    reply: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy over some marks, with a 95 % interval."""

    right: int
    total: int
    interval: Interval


@dataclass(frozen=True, slots=True)
class _Item:
    condition: Condition
    key: str
    question: Question
    shown: Scene

    def image(self) -> bytes:
        return _picture(self.shown, self.condition)


@functools.lru_cache(maxsize=1)  # a scene's questions follow one another
def _picture(scene: Scene, condition: Condition) -> bytes:
    if condition == "jpeg":
        return to_jpeg(render(scene, 640, 480))
    return to_png(render(scene, round(_SIDE_PX * scene.aspect), _SIDE_PX))


def examine(llm: LLM, scenes: Mapping[Condition, int], journal: Path, *, seed: int = 0) -> list[Mark]:
    """Ask about so many unseen scenes under each condition; replies already in the journal are not asked again."""
    marks: list[Mark] = []
    with Journal(journal) as known:
        for batch in _batches(_items(scenes, seed)):
            if batch[-1].key not in known:
                completions = llm.chat(
                    [Conversation.ask(item.question.text, item.image()) for item in batch], SamplingParams(max_tokens=_MAX_TOKENS)
                )
                known.put_many({item.key: completion.text for item, completion in zip(batch, completions, strict=True)})
                _LOG.info("examined %d questions", len(known))
            marks += [_mark(item, known.get(item.key)) for item in batch]
    return marks


def _batches(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    while batch := list(itertools.islice(items, _BATCH)):
        yield batch


def scores(marks: Sequence[Mark]) -> dict[str, dict[str, Score]]:
    """Tabulate accuracy: condition -> kind (and "all") -> score."""
    table: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for mark in marks:
        table[mark.condition][mark.kind].append(mark.is_right)
        table[mark.condition]["all"].append(mark.is_right)
    return {condition: {kind: _score(kinds[kind]) for kind in ("all", *KINDS) if kind in kinds} for condition, kinds in table.items()}


def prior_scores(marks: Sequence[Mark]) -> dict[str, Score]:
    """Score whoever always gives each kind's most common right answer, over marks of one condition: what blind replies come down to."""
    keys: dict[str, Counter[str]] = defaultdict(Counter)
    for mark in marks:
        keys[mark.kind][mark.key] += 1
    commonest = {kind: keys[kind].most_common(1)[0][0] for kind in keys}
    (table,) = scores([replace(mark, is_right=mark.key == commonest[mark.kind]) for mark in marks]).values()
    return table


def _score(results: Sequence[bool]) -> Score:
    return Score(sum(results), len(results), wilson_interval(sum(results), len(results)))


def _mark(item: _Item, reply: str) -> Mark:
    return Mark(item.condition, item.question.kind, item.question.text, item.question.key, reply, is_right(item.question, reply))


def _items(scenes: Mapping[Condition, int], seed: int) -> Iterator[_Item]:
    for condition, count in scenes.items():
        for index in range(count):
            rng = random.Random(_FIRST_SEED + seed * 10_000_019 + index)
            scene = draw_scene(rng, aspect=4 / 3 if condition == "jpeg" else 1.0, held_out=condition == "held_out")
            if condition == "wide":
                scene = inset(rng, scene, 1.5)
            shown = draw_scene(rng) if condition == "shuffled" else scene
            for position, question in enumerate(draw_questions(scene_truth(scene), rng, _QUESTIONS_PER_SCENE)):
                yield _Item(condition, f"{condition} {index} {position}", question, shown)
