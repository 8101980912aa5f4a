"""How a training run is set up: frozen, strict, saved with the run.

Owns: TrainConfig and its parts. Refuses: torch. Built from mappings by llavakit.config.build_run_config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llavakit.errors import ConfigError

__all__ = ["OptimConfig", "SaveConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimiser, schedule and clipping."""

    lr: float
    """Peak learning rate, reached after warmup_steps."""
    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of matrices inside layers and leaves the rest to adamw."""
    weight_decay: float = 0.0
    """Decoupled; applied to matrices only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; None does not clip."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """wsd is constant, then linear down over the last decay_share of the steps."""
    decay_share: float = 0.3
    """Share of the steps in which wsd decays."""
    final_lr_share: float = 0.0
    """Share of the peak at which the schedule ends."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be above 0, got {self.lr}")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.final_lr_share <= 1:
            raise ConfigError("optim.decay_share and optim.final_lr_share must be from 0 to 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optim.clip_norm must be above 0 or null, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig:
    """When the run saves itself."""

    every_s: float = 120.0
    """Seconds between saves; the last step is always saved."""
    keep_last: int = 2
    """Complete saves that are kept."""

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise ConfigError(f"save.keep_last must be at least 2, so that a damaged save has a predecessor; got {self.keep_last}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    steps: int
    """Optimiser steps."""
    optim: OptimConfig
    """Optimiser and schedule."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the parameters that train; all others are frozen."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations; parameters and optimiser states are float32."""
    microbatches: int = 1
    """Batches per step; the loss is divided by the supervised positions of all of them."""
    workers: int = 1
    """Processes that prepare batches; 0 prepares them in the training process. The batches do not depend on it."""
    save: SaveConfig = field(default_factory=SaveConfig)
    """Saving."""
    log_every_s: float = 20.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.microbatches < 1 or self.workers < 0:
            raise ConfigError("steps and microbatches must be at least 1, workers at least 0")
