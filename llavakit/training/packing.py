"""Sequences end to end in one batch.

Owns: pack, PackedSource (so many samples a batch) and BestFitSource (so many tokens a batch, lengths known).
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

import torch

from llavakit.errors import DataError
from llavakit.logs import logger
from llavakit.model.llava import PackedBatch
from llavakit.ops.loss import IGNORE
from llavakit.training.config import DataConfig
from llavakit.training.data import Sample, SampleSource, draw_sample

__all__ = ["BestFitSource", "PackedSource", "best_fit", "pack"]

_LOG = logger("training")


def pack(samples: Sequence[Sample], *, multiple_of: int = 1) -> PackedBatch:
    """Put samples end to end; labels_T[t] is the next token of the same sample where that one is supervised.

    The length is rounded up to a multiple with one unsupervised segment.

    Raises: DataError when nothing is supervised.
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
    if all(label == IGNORE for label in labels):
        raise DataError("a batch without any supervised token cannot train; check the samples' answers")
    if filler := -len(ids) % multiple_of:
        ids += [0] * filler
        labels += [IGNORE] * filler
        positions += range(filler)
        bounds.append(len(ids))
    tiles = [sample.tiles_N3SS for sample in samples if sample.tiles_N3SS.shape[0]]
    grids = tuple(grid for sample in samples for grid in sample.grids)
    return PackedBatch(
        torch.tensor(ids),
        torch.tensor(labels),
        torch.tensor(positions),
        torch.tensor(bounds, dtype=torch.int32),
        torch.cat(tiles) if tiles else None,
        grids if tiles else None,
    )


@dataclass(frozen=True, slots=True)
class PackedSource:
    """Batches of a fixed number of samples in index order: right for sources that draw samples at random themselves."""

    samples: SampleSource
    samples_per_batch: int
    multiple_of: int = 256
    """Lengths are rounded up to multiples of it."""

    def batch(self, number: int) -> PackedBatch:
        """Pack samples number * samples_per_batch and following."""
        first = number * self.samples_per_batch
        samples = [draw_sample(self.samples, index) for index in range(first, first + self.samples_per_batch)]
        return pack(samples, multiple_of=self.multiple_of)


class BestFitSource:
    """Batches of up to tokens_per_batch tokens from samples of known lengths, each sample once per epoch.

    An epoch is a seeded order of the samples, cut into windows; each window is packed by best_fit, and its packs are shuffled.
    """

    def __init__(self, samples: SampleSource, lengths: Sequence[int], config: DataConfig) -> None:
        """Leave out samples that are too long, and say how many. Raises: DataError when none is left."""
        self.samples, self.lengths, self.config = samples, lengths, config
        self.usable = [index for index, length in enumerate(lengths) if length <= config.max_sample_tokens]
        self.num_left_out = len(lengths) - len(self.usable)
        if not self.usable:
            raise DataError(f"no sample has at most {config.max_sample_tokens} tokens; raise data.max_sample_tokens")
        if self.num_left_out:
            _LOG.warning("%d of %d samples exceed %d tokens and are left out", self.num_left_out, len(lengths), config.max_sample_tokens)
        self._num_batches: list[int] = []  # of the epochs counted so far
        self._packs: tuple[int, list[list[int]]] = (-1, [])  # the epoch planned last

    def batch(self, number: int) -> PackedBatch:
        """Pack batch number n, counted on from epoch to epoch; its length is rounded up to tokens_per_batch."""
        epoch = 0
        while number >= (num_batches := self.num_batches(epoch)):
            number, epoch = number - num_batches, epoch + 1
        samples = [draw_sample(self.samples, index) for index in self.packs(epoch)[number]]
        return pack(samples, multiple_of=self.config.tokens_per_batch)

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch."""
        while len(self._num_batches) <= epoch:
            self._num_batches.append(len(self.packs(len(self._num_batches))))
        return self._num_batches[epoch]

    def packs(self, epoch: int) -> list[list[int]]:
        """Plan an epoch: the samples of each batch, a pure function of lengths, config and epoch."""
        if self._packs[0] != epoch:
            rng = random.Random(f"{self.config.seed}/{epoch}")
            order = rng.sample(self.usable, len(self.usable))
            packs: list[list[int]] = []
            for start in range(0, len(order), self.config.window):
                window = order[start : start + self.config.window]
                planned = best_fit([self.lengths[index] for index in window], self.config.tokens_per_batch)
                rng.shuffle(planned)
                packs += [[window[position] for position in chosen] for chosen in planned]
            self._packs = (epoch, packs)
        return self._packs[1]


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
