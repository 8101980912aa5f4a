"""Sequences end to end in one batch.

Owns: pack, PackedSource (so many samples a batch), Part and BestFitSource (so many tokens a batch, lengths known).
A batch may end in a filler segment that rounds its length up: where kernels are built per shape and building them is slow, a small
model's steps gain from meeting few shapes; where it is fast the filler costs its share (0.95 in benchmarks/results/choices.json).
Invariants: no position predicts across a boundary; what is packed is a pure function of the batch's number; nothing is cut here.
Legend: T tokens  N tiles  S side in pixels
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llavakit.errors import DataError, LlavaError
from llavakit.logs import logger
from llavakit.model.llava import PackedBatch
from llavakit.ops.loss import IGNORE
from llavakit.training.config import DataConfig
from llavakit.training.data import Drawn, Sample, SampleSource, draw_sample

__all__ = ["BestFitSource", "PackedSource", "Packer", "Part", "best_fit", "pack"]

_LOG = logger("training")
_MOST_EMPTY = 8


class Packer(Protocol):
    """Makes a batch of samples, its length rounded up to a multiple."""

    def __call__(self, samples: Sequence[Any], /, *, multiple_of: int) -> Any: ...


def pack(samples: Sequence[Sample], *, multiple_of: int = 1) -> PackedBatch:
    """Put samples end to end; labels_T[t] is the next token of the same sample where that one is supervised.

    The length is rounded up to a multiple with one unsupervised segment.

    Raises: DataError when there are samples and nothing is supervised.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    bounds = [0]
    for sample in samples:
        ids += sample.ids
        labels += [index if counts else IGNORE for index, counts in zip(sample.ids[1:], sample.loss_mask[1:], strict=True)]
        labels.append(IGNORE)
        positions += range(len(sample.ids))
        bounds.append(len(ids))
    if samples and all(label == IGNORE for label in labels):
        raise DataError("a batch without any supervised token cannot train; check the samples' answers")
    if filler := -len(ids) % multiple_of:
        ids += [0] * filler
        labels += [IGNORE] * filler
        positions += range(filler)
        bounds.append(len(ids))
    tiles = [sample.tiles_N3SS for sample in samples if sample.tiles_N3SS.shape[0]]
    seen = [sample.seen_NPD for sample in samples if sample.seen_NPD is not None]
    grids = tuple(grid for sample in samples for grid in sample.grids)
    return PackedBatch(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(bounds, dtype=torch.int32),
        torch.cat(tiles) if tiles else None,
        grids if grids else None,
        torch.cat(seen) if seen else None,
    )


@dataclass(frozen=True, slots=True)
class PackedSource:
    """Batches of a fixed number of samples in index order: right for sources that draw samples at random themselves."""

    samples: SampleSource
    samples_per_batch: int
    multiple_of: int = 256
    """Lengths are rounded up to multiples of it."""

    def batch(self, number: int) -> Drawn:
        """Pack samples number * samples_per_batch and following."""
        first = number * self.samples_per_batch
        samples = [draw_sample(self.samples, index) for index in range(first, first + self.samples_per_batch)]
        return Drawn(pack(samples, multiple_of=self.multiple_of), len(samples), sum(sample.num_tokens for sample in samples))


@dataclass(frozen=True, slots=True)
class Part:
    """One set of samples of a mixture, with what is known of each before it is built."""

    name: str
    samples: Any
    """A source of samples by index, of the kind that the packer takes."""
    lengths: Sequence[int]
    """Tokens of each; 0 for one that cannot train."""
    weight: float = 1.0
    """How often an epoch goes through the set."""

    def order(self, usable: Sequence[int], seed: int, epoch: int) -> list[int]:
        """Choose an epoch's samples, in random order; what one epoch leaves out of a set comes first in the next."""
        first = round(len(usable) * self.weight * epoch)
        count = round(len(usable) * self.weight * (epoch + 1)) - first
        chosen: list[int] = []
        while len(chosen) < count:
            turn, place = divmod(first + len(chosen), len(usable))
            shuffled = random.Random(f"{seed}/{self.name}/{turn}").sample(usable, len(usable))
            chosen += shuffled[place : place + count - len(chosen)]
        return chosen


class BestFitSource:
    """Batches of up to tokens_per_batch tokens from samples of known lengths.

    An epoch is a seeded order of the samples of all parts, as often as their weights say, cut into windows. Each window is packed by
    best_fit, its last pack is filled up in the next window, and its packs are shuffled. A sample that cannot be built when its turn
    comes is left out, with the reason.
    """

    def __init__(self, parts: Sequence[Part], config: DataConfig, *, packer: Packer = pack) -> None:
        """Leave out samples that are too long, and say how many; packer makes a batch of samples.

        Raises: DataError when a part has none left.
        """
        self.parts, self.config, self._packer = parts, config, packer
        self._usable = [[index for index, length in enumerate(part.lengths) if 0 < length <= config.max_sample_tokens] for part in parts]
        for part, usable in zip(parts, self._usable, strict=True):
            if not usable:
                raise DataError(f"{part.name}: no sample can train with at most {config.max_sample_tokens} tokens (data.max_sample_tokens)")
            if num_long := sum(length > config.max_sample_tokens for length in part.lengths):
                _LOG.warning("%s: %d samples exceed %d tokens and are left out", part.name, num_long, config.max_sample_tokens)
        self._num_batches: list[int] = []  # of the epochs counted so far
        self._packs: tuple[int, list[list[tuple[int, int]]]] = (-1, [])  # the epoch planned last

    @property
    def num_usable(self) -> int:
        """Samples that can train, over all parts."""
        return sum(map(len, self._usable))

    def batch(self, number: int) -> Drawn:
        """Pack batch number n, counted on from epoch to epoch."""
        epoch = 0
        while number >= (num_batches := self.num_batches(epoch)):
            number, epoch = number - num_batches, epoch + 1
        packs = self.packs(epoch)
        left_out: list[str] = []
        tries = min(_MOST_EMPTY, len(packs))
        for place in range(number, number + tries):
            samples = self._samples(packs[place % len(packs)], left_out)
            if samples:  # of a batch none of which can be built the next one takes the place
                packed = self._packer(samples, multiple_of=self.config.multiple_of)
                return Drawn(packed, len(samples), sum(sample.num_tokens for sample in samples), tuple(left_out))
        raise DataError(f"no sample of {tries} batches in a row can be built; the last: {left_out[-1]}")

    def _samples(self, pack: Sequence[tuple[int, int]], left_out: list[str]) -> list[Any]:
        """Build the samples of a pack, and say of which why they cannot be built."""
        samples: list[Any] = []
        for part, index in pack:
            try:
                samples.append(draw_sample(self.parts[part].samples, index))
            except LlavaError as error:
                left_out.append(f"{self.parts[part].name}: {error}")
        return samples

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch."""
        while len(self._num_batches) <= epoch:
            self._num_batches.append(len(self.packs(len(self._num_batches))))
        return self._num_batches[epoch]

    def packs(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Plan an epoch: the samples of each batch as (part, index), a pure function of lengths, config and epoch."""
        if self._packs[0] != epoch:
            order = [
                (place, index)
                for place, (part, usable) in enumerate(zip(self.parts, self._usable, strict=True))
                for index in part.order(usable, self.config.seed, epoch)
            ]
            rng = random.Random(f"{self.config.seed}/{epoch}")
            rng.shuffle(order)
            packs: list[list[tuple[int, int]]] = []
            waiting: list[tuple[int, int]] = []
            for start in range(0, len(order), self.config.window):
                window = [*waiting, *order[start : start + self.config.window]]
                planned = best_fit([self.parts[part].lengths[index] for part, index in window], self.config.tokens_per_batch)
                # best_fit opens its last pack for what is left; it is filled up in the next window.
                waiting = [window[position] for position in planned.pop()] if start + self.config.window < len(order) else []
                rng.shuffle(planned)
                packs += [[window[position] for position in chosen] for chosen in planned]
            self._packs = (epoch, packs)
        return self._packs[1]

    def fullness(self, epoch: int) -> float:
        """Return the share of an epoch's room that samples take."""
        packs = self.packs(epoch)
        num_tokens = sum(self.parts[part].lengths[index] for chosen in packs for part, index in chosen)
        return num_tokens / (len(packs) * self.config.tokens_per_batch)


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group samples of known lengths into packs of at most budget tokens, longest first into the fullest pack that fits.

    Returns the indices of each pack. Raises: DataError when a sample exceeds the budget.
    """
    if lengths and max(lengths) > budget:
        raise DataError(f"sample {lengths.index(max(lengths))} has {max(lengths)} tokens, the budget is {budget}")
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect.bisect_left(rooms, (lengths[index], 0))
        if at == len(rooms):
            packs.append([])
            room, chosen = budget, len(packs) - 1
        else:
            room, chosen = rooms.pop(at)
        packs[chosen].append(index)
        bisect.insort(rooms, (room - lengths[index], chosen))
    return packs
