"""What a run trains on: samples by index, batches by step.

Owns: Sample, the two source protocols, the loader that prepares batches ahead in processes.
Invariant: a batch is a pure function of its step, so the data position of a run is its step, whatever the workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llavakit.processing.processor import Prompt

__all__ = ["BatchSource", "Sample", "SampleSource", "load_batches", "sample_of_prompt"]

_PREFETCH_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on: ids, which of them are to be produced, and its tiles [N, 3, S, S]."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    tiles_N3SS: Tensor


class SampleSource(Protocol):
    """Samples by index: sample(i) is a pure function."""

    def sample(self, index: int) -> Sample:
        """Build sample number index."""
        ...


class BatchSource(Protocol):
    """Batches by number: batch(n) is a pure function."""

    def batch(self, number: int) -> Any:
        """Build batch number n; its type is what the model's loss_packed takes."""
        ...


def sample_of_prompt(prompt: Prompt) -> Sample:
    """Keep of a prompt what training needs."""
    return Sample(prompt.ids, prompt.loss_mask, prompt.tiles_N3SS)


def load_batches(source: BatchSource, *, first: int, stop: int, workers: int) -> Iterator[Any]:
    """Iterate over batches first..stop-1 in order, prepared ahead by worker processes; their exceptions surface here."""
    loader = DataLoader(
        _ByNumber(source),
        sampler=range(first, stop),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCH_BATCHES if workers else None,
    )
    return iter(loader)


class _ByNumber(Dataset[Any]):
    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def __getitem__(self, number: int) -> Any:
        return self.source.batch(number)
