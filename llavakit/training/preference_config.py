"""What preference training minimises: frozen, strict, saved with the run.

Owns: PreferenceConfig, CorruptionConfig. Refuses: torch. docs/preference.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llavakit.errors import ConfigError

__all__ = ["CorruptionConfig", "PreferenceConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionConfig:
    """How a picture is spoilt so that the preferred answer no longer follows from it."""

    kind: Literal["crop", "blank", "noise"] = "crop"
    """A small part of it, enlarged; the mean colour alone; mixed with noise."""
    crop_share: float = 0.2
    """Largest share of its area that a crop keeps; the share is drawn from 0.01 up."""
    noise_share: float = 0.5
    """Share of the noise in the variance of the mixture."""
    seed: int = 0
    """Of what is drawn; a sample is spoilt the same way in every epoch."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.crop_share <= 1:
            raise ConfigError(f"corruption.crop_share must be from 0.01 to 1, got {self.crop_share}")
        if not 0 < self.noise_share <= 1:
            raise ConfigError(f"corruption.noise_share must be above 0 and at most 1, got {self.noise_share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceConfig:
    """The loss over pairs of a preferred and a rejected answer."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's logistic loss of summed log probabilities, or IPO's squared loss of mean ones."""
    beta: float = 0.1
    """How strongly the model is held to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round; with sigmoid only."""
    sft_weight: float = 0.0
    """Weight of the preferred answer's mean cross entropy."""
    conditional_weight: float = 0.0
    """Weight of mDPO's preference for the picture over a spoilt one, given the preferred answer; mDPO has 1."""
    anchor_weight: float = 0.0
    """Weight of mDPO's term that keeps the preferred answer at least as likely as under the reference; mDPO has 1."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """How pictures are spoilt where conditional_weight is above 0."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"preference.beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"preference.label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        weights = (self.sft_weight, self.conditional_weight, self.anchor_weight)
        if min(weights) < 0:
            raise ConfigError(f"preference's sft_weight, conditional_weight and anchor_weight must be at least 0, got {weights}")
        if self.loss == "ipo" and (self.label_smoothing or self.conditional_weight or self.anchor_weight):
            raise ConfigError("label_smoothing, conditional_weight and anchor_weight belong to preference.loss sigmoid, got ipo")

    @property
    def spoils(self) -> CorruptionConfig | None:
        """How samples need their pictures spoilt; None where they do not."""
        return self.corruption if self.conditional_weight else None
