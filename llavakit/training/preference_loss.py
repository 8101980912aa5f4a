"""What preference training minimises: DPO, IPO, and mDPO's further terms.

Owns: PreferenceLoss, and where reference log probabilities come from: Reference, BatchReference, AdaptersOff. docs/preference.md has the
formulas and their sources.
Legend: A answers  P pairs
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.errors import DataError
from llavakit.model.llava import LossTerms
from llavakit.training.objectives import COMPUTE_DTYPES
from llavakit.training.preference import PreferenceBatch
from llavakit.training.preference_config import PreferenceConfig

__all__ = ["AdaptersOff", "BatchReference", "PreferenceLoss", "Reference"]


class Reference(Protocol):
    """How likely the answers of a batch were before training."""

    def logprobs(self, model: Any, batch: PreferenceBatch, dtype: torch.dtype) -> Tensor:
        """Return sums_A without gradients; activations in dtype."""
        ...


@dataclass(frozen=True, slots=True)
class BatchReference:
    """The values that were computed before and came with the samples."""

    def logprobs(self, model: Any, batch: PreferenceBatch, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - computed by another model
        """Return the batch's own. Raises: DataError where it has none."""
        if batch.reference_A is None:
            raise DataError("the pairs have no reference log probabilities; compute them first, or switch adapters off instead")
        return batch.reference_A


@dataclass(frozen=True, slots=True)
class AdaptersOff:
    """The trained model itself while its adapters are switched off: what it was before they were added."""

    switched_off: Callable[[Any], AbstractContextManager[Any]]
    """Switch a model's adapters off for a with block."""

    def logprobs(self, model: Any, batch: PreferenceBatch, dtype: torch.dtype) -> Tensor:
        """Run the model once more."""
        with torch.no_grad(), self.switched_off(model):
            sums_A: Tensor = model.logprobs_packed(batch, dtype=dtype)
        return sums_A


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """The loss over pairs: its weight is their number."""

    config: PreferenceConfig
    compute_dtype: Literal["float32", "bfloat16"]
    """Dtype of the activations; log probabilities and losses are float32."""
    reference: Reference = BatchReference()
    touches_all: bool = False
    """Whether every parameter must get a gradient in every batch: for LlavaCore where several processes train."""

    entries: ClassVar[tuple[str, ...]] = ("logprobs_packed",)
    """Methods of the model that it calls."""

    def loss(self, model: Any, batch: PreferenceBatch) -> LossTerms:
        """Score all answers in one call and compare them pair by pair.

        Metrics: pairs, those whose preferred answer has the higher reward, and summed rewards (beta times the log ratio to the
        reference) of the preferred answers, the rejected ones, and their difference.
        """
        self._check(batch)
        dtype = COMPUTE_DTYPES[self.compute_dtype]
        reference_A = self.reference.logprobs(model, batch, dtype)  # first, so that what it needs is gone before gradients are kept
        sums_A: Tensor = model.logprobs_packed(batch, dtype=dtype, **({"touch": True} if self.touches_all else {}))
        chosen_P, rejected_P, _ = batch.pairs_P3.unbind(1)
        ratios_A = sums_A - reference_A
        losses_P = self._preference(ratios_A[chosen_P], ratios_A[rejected_P], batch.lengths_A[chosen_P], batch.lengths_A[rejected_P])
        losses_P = losses_P + self._further_terms(sums_A, ratios_A, batch)
        rewards_A = self.config.beta * ratios_A.detach()
        margins_P = rewards_A[chosen_P] - rewards_A[rejected_P]
        weight = torch.tensor(chosen_P.shape[0])
        metrics = {
            "num_pairs": weight,
            "num_right": (margins_P > 0).sum(),
            "margin": margins_P.sum(),
            "chosen_reward": rewards_A[chosen_P].sum(),
            "rejected_reward": rewards_A[rejected_P].sum(),
        }
        return LossTerms(losses_P.sum(), weight, metrics)

    def _check(self, batch: PreferenceBatch) -> None:
        has_spoilt = batch.lengths_A.shape[0] > 2 * batch.pairs_P3.shape[0]
        if self.config.conditional_weight and batch.pixels_N3SS is not None and not has_spoilt:
            raise DataError("conditional_weight is above 0, but no picture of the batch was spoilt; build the samples with the corruption")

    def _preference(self, chosen_P: Tensor, rejected_P: Tensor, chosen_lengths_P: Tensor, rejected_lengths_P: Tensor) -> Tensor:
        """Compare the log ratios of both answers."""
        beta, smoothing = self.config.beta, self.config.label_smoothing
        if self.config.loss == "ipo":
            return (chosen_P / chosen_lengths_P - rejected_P / rejected_lengths_P - 1 / (2 * beta)).square()
        scaled_P = beta * (chosen_P - rejected_P)
        return -(1 - smoothing) * F.logsigmoid(scaled_P) - smoothing * F.logsigmoid(-scaled_P)

    def _further_terms(self, sums_A: Tensor, ratios_A: Tensor, batch: PreferenceBatch) -> Tensor:
        """Add up the terms that have a weight of their own."""
        config = self.config
        chosen_P, _, spoilt_P = batch.pairs_P3.unbind(1)
        terms_P = torch.zeros_like(sums_A[chosen_P])
        if config.sft_weight:
            terms_P = terms_P - config.sft_weight * sums_A[chosen_P] / batch.lengths_A[chosen_P]
        if config.conditional_weight:
            scaled_P = config.beta * (ratios_A[chosen_P] - ratios_A[spoilt_P.clamp(min=0)])
            terms_P = terms_P - config.conditional_weight * torch.where(spoilt_P >= 0, F.logsigmoid(scaled_P), 0.0)
        if config.anchor_weight:
            terms_P = terms_P - config.anchor_weight * F.logsigmoid(config.beta * ratios_A[chosen_P])
        return terms_P
