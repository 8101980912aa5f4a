"""Pairs of a preferred and a rejected answer to one prompt, and batches of them.

Owns: PreferenceSample, building one with the processor that serves, pack_pairs. Refuses: rows and files.
Invariants: what two answers share is found in their ids, never in text, and is computed once; a prompt's earlier answers carry no loss;
a batch is a pure function of its samples.
Legend: T tokens  M supervised rows  A answers  P pairs  N tiles  S side in pixels
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llavakit.errors import DataError
from llavakit.geometry import ImageGrid
from llavakit.model.llava import AnswerBatch
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.segments import num_common
from llavakit.processing.text import TextProcessor
from llavakit.training.corruption import spoilt_tiles
from llavakit.training.preference_config import CorruptionConfig
from llavakit.types import Conversation, Message, TextPart

__all__ = ["Answered", "PreferenceBatch", "PreferenceSample", "PreferenceSource", "encode_pair", "pack_pairs", "preference_sample"]


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and one answer to it: ids, and which of them are the answer's."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class PreferenceSample:
    """Two answers to one prompt, with its tiles [N, 3, S, S] and the grids of their pictures.

    Raises: DataError when the answers are the same, one is empty, or what comes before them differs.
    """

    chosen: Answered
    rejected: Answered
    tiles_N3SS: Tensor
    grids: tuple[ImageGrid, ...]
    spoilt_N3SS: Tensor | None = None
    """The tiles of the spoilt pictures, under which the preferred answer is scored too."""
    reference: tuple[float, ...] | None = None
    """Log probabilities under the reference model: of the preferred answer, the rejected one, and where there is one the spoilt one."""

    def __post_init__(self) -> None:
        if self.chosen.ids == self.rejected.ids:
            raise DataError("the chosen and the rejected answer are the same; a pair needs two different ones")
        for name, answered in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not any(answered.loss_mask):
                raise DataError(f"the {name} answer is empty; a pair needs two answers")
            if not 1 <= answered.loss_mask.index(True) <= self.num_shared:
                raise DataError(
                    f"the answers follow different prompts: {self.num_shared} ids are shared, but the {name} answer begins after "
                    f"{answered.loss_mask.index(True)}; encode both answers behind the same prompt"
                )
        if self.reference is not None and len(self.reference) != self.num_answers:
            raise DataError(f"a sample of {self.num_answers} answers needs as many reference values, got {len(self.reference)}")

    @property
    def num_shared(self) -> int:
        """Tokens with which both answers begin: the prompt's, and those that the answers have in common at their beginning."""
        return num_common(self.chosen.ids, self.rejected.ids)

    @property
    def num_answers(self) -> int:
        """Answers that are scored: 2, or 3 with the preferred one under spoilt pictures."""
        return 2 if self.spoilt_N3SS is None else 3

    @property
    def num_tokens(self) -> int:
        """Tokens that the pair takes in a batch."""
        num_spoilt = 0 if self.spoilt_N3SS is None else len(self.chosen.ids)
        return len(self.chosen.ids) + len(self.rejected.ids) - self.num_shared + num_spoilt


class PreferenceSource(Protocol):
    """Pairs by index: sample(i) is a pure function."""

    def sample(self, index: int) -> PreferenceSample:
        """Build pair number index."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceBatch(AnswerBatch):
    """Several pairs end to end."""

    pairs_P3: Tensor
    """Of each pair the numbers of its answers: preferred, rejected, and preferred under spoilt pictures or -1."""
    reference_A: Tensor | None = None
    """The answers' log probabilities under the reference model, where they were computed before."""


def preference_sample(
    processor: LlavaProcessor | TextProcessor,
    conversation: Conversation,
    chosen: str,
    rejected: str,
    *,
    corruption: CorruptionConfig | None = None,
) -> PreferenceSample:
    """Build the sample of a conversation that ends with a question; corruption adds spoilt pictures where there are any.

    Raises: DataError as PreferenceSample; ImageError, PromptError.
    """
    asked = processor.prompt(conversation)
    pair = encode_pair(processor, conversation, chosen, rejected, asked.grids)
    spoilt_N3SS = None
    if corruption is not None and asked.grids and isinstance(processor, LlavaProcessor):
        rng = random.Random(f"{corruption.seed}/{asked.digests}/{pair[0].ids}")
        spoilt_N3SS = spoilt_tiles(asked.tiles_N3SS, conversation.images, processor, corruption, rng)
    return PreferenceSample(*pair, asked.tiles_N3SS, asked.grids, spoilt_N3SS)


def encode_pair(
    processor: LlavaProcessor | TextProcessor, conversation: Conversation, chosen: str, rejected: str, grids: Sequence[ImageGrid]
) -> tuple[Answered, Answered]:
    """Encode both answers to a conversation whose pictures have these grids; none is opened. Raises: DataError, PromptError."""
    asked_ids = processor.encode_chat(conversation, grids)[1].ids
    pair = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise DataError(f"the {name} answer is empty; a pair needs two answers")
        answered = Conversation((*conversation.messages, Message("assistant", (TextPart(text),))))
        chat = processor.encode_chat(answered, grids, add_generation_prompt=False)[1]
        num_asked = num_common(asked_ids, chat.ids)
        mask = (False,) * num_asked + chat.loss_mask[num_asked:]
        pair.append(Answered(chat.ids, mask))
    return pair[0], pair[1]


def pack_pairs(samples: Sequence[PreferenceSample], *, multiple_of: int = 1) -> PreferenceBatch:
    """Put pairs end to end: what a pair shares, then what is left of either answer, then the preferred one under spoilt pictures.

    The length is rounded up to a multiple with one segment that nobody scores. Raises: DataError when there are no pairs, or only
    some of them have reference values.
    """
    if not samples:
        raise DataError("a batch without any pair cannot train; check the rows")
    packing, pairs = _Packing(), []
    for sample in samples:
        num_shared = sample.num_shared
        stem = packing.add_segment(sample.chosen.ids[:num_shared])
        numbers = [packing.add_branch(answered, stem, num_shared) for answered in (sample.chosen, sample.rejected)]
        if sample.spoilt_N3SS is not None:
            whole = packing.add_segment(sample.chosen.ids)
            numbers.append(packing.add_answer(sample.chosen, packing.places(whole)))
        pairs.append((*numbers, -1)[:3])
    if filler := -len(packing.ids) % multiple_of:
        packing.add_segment((0,) * filler)
    tiles = [tiles for sample in samples for tiles in (sample.tiles_N3SS, sample.spoilt_N3SS) if tiles is not None and tiles.shape[0]]
    grids = tuple(grid for sample in samples for grid in sample.grids * (sample.num_answers - 1))
    return PreferenceBatch(
        ids_T=torch.tensor(packing.ids),
        positions_T=torch.tensor(packing.positions),
        cu_seqlens=torch.tensor(packing.bounds, dtype=torch.int32),
        stems_B=torch.tensor(packing.stems),
        rows_M=torch.tensor(packing.rows),
        labels_M=torch.tensor(packing.labels),
        lengths_A=torch.tensor(packing.lengths),
        pixels_N3SS=torch.cat(tiles) if tiles else None,
        grids=grids if tiles else None,
        pairs_P3=torch.tensor(pairs),
        reference_A=_reference(samples),
    )


@dataclass(slots=True)
class _Packing:
    """A batch in the making."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    stems: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add_segment(self, ids: Sequence[int], *, stem: int = -1, first: int = 0) -> int:
        """Append a segment whose positions begin at first; returns its number."""
        self.ids += ids
        self.positions += range(first, first + len(ids))
        self.bounds.append(len(self.ids))
        self.stems.append(stem)
        return len(self.stems) - 1

    def add_branch(self, answered: Answered, stem: int, num_shared: int) -> int:
        """Append what an answer has beyond its stem, which may be nothing; returns the answer's number."""
        places = self.places(stem)
        if len(answered.ids) > num_shared:
            places += self.places(self.add_segment(answered.ids[num_shared:], stem=stem, first=num_shared))
        return self.add_answer(answered, places)

    def add_answer(self, answered: Answered, places: Sequence[int]) -> int:
        """Score an answer whose tokens lie at these places: each is predicted at the place before; returns its number."""
        learned = [place for place in range(1, len(answered.ids)) if answered.loss_mask[place]]
        self.rows += [places[place - 1] for place in learned]
        self.labels += [answered.ids[place] for place in learned]
        self.lengths.append(len(learned))
        return len(self.lengths) - 1

    def places(self, segment: int) -> list[int]:
        """List the places of a segment's tokens."""
        return list(range(self.bounds[segment], self.bounds[segment + 1]))


def _reference(samples: Sequence[PreferenceSample]) -> Tensor | None:
    known = [sample.reference for sample in samples if sample.reference is not None]
    if not known:
        return None
    if len(known) != len(samples):
        raise DataError(f"{len(known)} of {len(samples)} pairs have reference values; compute them for all")
    return torch.tensor([value for values in known for value in values], dtype=torch.float32)
