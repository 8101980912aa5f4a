"""The training samples of the miniature's language stages, drawn by index.

Owns: what each stage reads: text of this world, pictures with captions, pictures with instructions.
Invariant: sample(i) is a pure function of the seed and i.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from llavakit.processing.processor import LlavaProcessor
from llavakit.reproduce.pictures import draw_picture
from llavakit.reproduce.teacher import caption_pair, instruction, small_talk, text_instruction
from llavakit.training.data import Sample, sample_of_prompt
from llavakit.types import Conversation
from llavakit.world.scenes import draw_scene
from llavakit.world.truth import scene_truth

__all__ = ["Lessons"]

_TURNS = (3, 6)
_TEXT_TURNS = (3, 6)
_NO_BYTES = b""  # pictures are handed over decoded; the conversation only marks their places
_SHARES = {"text": (0.0, 0.93), "captions": (1.0, 0.0), "instructions": (0.91, 0.05)}
"""Of each lesson: the share with pictures, and the share of described scenes; the rest is small talk."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """Samples of one kind of lesson; the processor's template must fit it (plain for captions)."""

    kind: Literal["text", "captions", "instructions"]
    seed: int
    processor: LlavaProcessor

    def sample(self, index: int) -> Sample:
        """Draw sample number index."""
        rng = random.Random(self.seed + index)
        with_picture, described = _SHARES[self.kind]
        roll = rng.random()
        if roll < with_picture:
            return self._picture_sample(rng)
        truth = scene_truth(draw_scene(rng))
        if roll < with_picture + described:
            return self._text_sample(text_instruction(truth, rng, rng.randint(*_TEXT_TURNS)))
        return self._text_sample(small_talk(rng, truth))

    def _picture_sample(self, rng: random.Random) -> Sample:
        picture = draw_picture(rng)
        truth = scene_truth(picture.scene)
        if self.kind == "captions":
            conversation = caption_pair(truth, rng, _NO_BYTES)
        else:
            conversation = instruction(truth, rng, _NO_BYTES, rng.randint(*_TURNS))
        return sample_of_prompt(self.processor.prompt_of_images(conversation, [picture.image], add_generation_prompt=False))

    def _text_sample(self, conversation: Conversation) -> Sample:
        return sample_of_prompt(self.processor.prompt_of_images(conversation, [], add_generation_prompt=False))
