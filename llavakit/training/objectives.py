"""What a run minimises.

Owns: the Objective protocol and PackedLoss. An objective returns a sum and its weight; the trainer divides by the weight of the
whole step, so that the split into microbatches (and later ranks) changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from llavakit.model.llava import LossTerms, PackedBatch

__all__ = ["COMPUTE_DTYPES", "NUM_SAMPLES", "NUM_TOKENS", "Objective", "PackedLoss"]

NUM_TOKENS, NUM_SAMPLES = "num_tokens", "num_samples"
"""Metrics from which the reporter works out rates; the other metrics are reported as shares of the first of them."""
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""TrainConfig.compute_dtype as torch's dtypes."""


class Objective(Protocol):
    """A loss over one microbatch."""

    def loss(self, model: Any, batch: Any) -> LossTerms:
        """Return the differentiable sum, the number of supervised positions, and counters."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLoss:
    """The model's own loss_packed: for language models the cross entropy of the supervised tokens."""

    compute_dtype: Literal["float32", "bfloat16"]
    """Dtype of the activations."""

    def loss(self, model: Any, batch: Any) -> LossTerms:
        """Call loss_packed once; count the tokens and sequences of a PackedBatch (a filler counts as one)."""
        terms: LossTerms = model.loss_packed(batch, dtype=COMPUTE_DTYPES[self.compute_dtype])
        if not isinstance(batch, PackedBatch):
            return terms
        counts = {NUM_TOKENS: torch.tensor(batch.ids_T.numel()), NUM_SAMPLES: torch.tensor(batch.cu_seqlens.numel() - 1)}
        return LossTerms(terms.sum, terms.weight, {**terms.metrics, **counts})
