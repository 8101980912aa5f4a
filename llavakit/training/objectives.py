"""What a run minimises.

Owns: the Objective protocol and PackedLoss. An objective returns a sum and its weight; the trainer divides by the weight of the
whole step, so that the split into microbatches (and later ranks) changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from llavakit.model.llava import LossTerms

__all__ = ["COMPUTE_DTYPES", "Objective", "PackedLoss"]

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""TrainConfig.compute_dtype as torch's dtypes."""


class Objective(Protocol):
    """A loss over one microbatch."""

    entries: ClassVar[tuple[str, ...]]
    """Methods of the model that it calls."""

    def loss(self, model: Any, batch: Any) -> LossTerms:
        """Return the differentiable sum, the number of supervised positions, and counters, of which all but the first are shares of it."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLoss:
    """The model's own loss_packed: for language models the cross entropy of the supervised tokens."""

    compute_dtype: Literal["float32", "bfloat16"]
    """Dtype of the activations."""
    touches_all: bool = False
    """Whether every parameter must get a gradient in every batch: for LlavaCore where several processes train."""

    entries: ClassVar[tuple[str, ...]] = ("loss_packed",)

    def loss(self, model: Any, batch: Any) -> LossTerms:
        """Call loss_packed once."""
        options = {"touch": True} if self.touches_all else {}
        terms: LossTerms = model.loss_packed(batch, dtype=COMPUTE_DTYPES[self.compute_dtype], **options)
        return terms
