"""How a training run is set up: frozen, strict, saved with the run.

Owns: TrainConfig (what the trainer reads) and DataConfig (what a packing source reads). Refuses: torch.
Built from mappings by llavakit.config.build_run_config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llavakit.config import run_config_to_dict
from llavakit.errors import ConfigError

__all__ = ["DataConfig", "OptimConfig", "SaveConfig", "TrainConfig"]

_FREE_TO_CHANGE = ("workers", "save", "log_every_s")  # change no bit of the result


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
    """wsd is constant, then linear down over the last decay_share of the steps after warm-up."""
    decay_share: float = 0.3
    """Share of the steps after warm-up in which wsd decays."""
    final_lr_share: float = 0.0
    """Share of the peak at which the schedule ends."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be above 0, got {self.lr}")
        if self.weight_decay < 0 or self.warmup_steps < 0 or not self.eps > 0:
            raise ConfigError("optim.weight_decay and optim.warmup_steps must be at least 0, optim.eps above 0")
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise ConfigError(f"optim.beta1 and optim.beta2 must be at least 0 and below 1, got {self.beta1} and {self.beta2}")
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
        if self.every_s < 0:
            raise ConfigError(f"save.every_s must be at least 0 (0 saves after each step), got {self.every_s}")
        if self.keep_last < 2:
            raise ConfigError(f"save.keep_last must be at least 2, so that a damaged save has a predecessor; got {self.keep_last}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How samples of known lengths are packed into batches."""

    tokens_per_batch: int = 8192
    """Tokens that a batch may hold."""
    max_sample_tokens: int = 2048
    """Longer samples are left out, counted and reported."""
    window: int = 4096
    """Samples that are packed together; larger fills batches better, smaller mixes them better."""
    seed: int = 0
    """Seed of the order of samples; each epoch has its own order."""

    def __post_init__(self) -> None:
        if not 2 <= self.max_sample_tokens <= self.tokens_per_batch:
            raise ConfigError(
                f"data.max_sample_tokens must be from 2 to data.tokens_per_batch ({self.tokens_per_batch}), got {self.max_sample_tokens}"
            )
        if self.window < 1:
            raise ConfigError(f"data.window must be at least 1, got {self.window}")


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
        if not self.trainable:
            raise ConfigError("trainable needs at least one pattern of parameter names; ('*',) trains everything")

    def identity(self) -> dict[str, Any]:
        """Return the settings that the result depends on; a run resumes only where they are the same."""
        return {name: value for name, value in run_config_to_dict(self).items() if name not in _FREE_TO_CHANGE}
