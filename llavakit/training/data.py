"""What a run trains on: samples by index, batches by number.

Owns: Sample, Drawn, the two source protocols, the digest by which a resumed run recognises its data.
Invariant: a batch is a pure function of its number, so the data position of a run is its step, whatever the workers.
Legend: N tiles  S side in pixels  P patches  D width of the tower
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from llavakit.errors import DataError, LlavaError
from llavakit.geometry import ImageGrid
from llavakit.processing.processor import Prompt

__all__ = ["BatchSource", "Drawn", "Sample", "SampleSource", "batch_digest", "draw_sample", "moved", "sample_of_prompt"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on: ids, which of them are to be produced, and its tiles [N, 3, S, S] with the grids of their pictures."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    tiles_N3SS: Tensor
    grids: tuple[ImageGrid, ...]
    seen_NPD: Tensor | None = None
    """What the tower makes of the tiles, where that is known already; then there are no tiles."""

    @property
    def num_tokens(self) -> int:
        """Positions, pictures included."""
        return len(self.ids)


class SampleSource(Protocol):
    """Samples by index: sample(i) is a pure function."""

    def sample(self, index: int) -> Sample:
        """Build sample number index."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch, and what became of the samples that belong in it."""

    batch: Any
    """What the objective takes: a dataclass of tensors."""
    num_samples: int
    """Samples in it."""
    num_tokens: int
    """Their tokens; 0 where samples have none."""
    left_out: tuple[str, ...] = ()
    """One sentence for each sample that belongs in it and could not be built."""


class BatchSource(Protocol):
    """Batches by number: batch(n) is a pure function."""

    def batch(self, number: int) -> Drawn:
        """Build batch number n."""
        ...


def sample_of_prompt(prompt: Prompt) -> Sample:
    """Keep of a prompt what training needs."""
    return Sample(prompt.ids, prompt.loss_mask, prompt.tiles_N3SS, prompt.grids)


def draw_sample(source: Any, index: int) -> Any:
    """Build a sample so that whatever goes wrong names it. Raises: DataError for any error of the package."""
    with _Naming(f"sample {index}"):
        return source.sample(index)


def batch_digest(batch: Any) -> str:
    """Digest all tensors of a batch, so that two batches can be compared without keeping one."""
    hasher = hashlib.sha256()
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            hasher.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
            hasher.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch whose tensors lie on a device."""
    if device.type == "cpu":
        return batch
    tensors = {field.name: value for field in dataclasses.fields(batch) if isinstance(value := getattr(batch, field.name), Tensor)}
    return dataclasses.replace(batch, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


class _Naming:
    """Say in an error from inside the block what was being built."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, LlavaError):
            raise DataError(f"{self.name}: {error}") from error
        if error is not None:
            error.add_note(f"while building {self.name}")
