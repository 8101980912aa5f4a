"""Which products get low-rank factors to train, and of what size.

Owns: LoraConfig. Refuses: torch. Built from mappings by llavakit.config.build_run_config; surgery.add_lora reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llavakit.errors import ConfigError

__all__ = ["DECODER_PRODUCTS", "LoraConfig"]

DECODER_PRODUCTS = "*model.layers.*_proj"
"""Every product of the decoder's layers, in a language model alone and in a LLaVA: what LLaVA-1.5's LoRA adapts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation: scale * B A is added to the weight of each target."""

    rank: int
    """Rows of A, columns of B."""
    alpha: float
    """The scale is alpha / rank."""
    dropout: float = 0.0
    """Share of A's inputs that is dropped in training."""
    targets: tuple[str, ...] = (DECODER_PRODUCTS,)
    """Patterns of the products' paths (shell wildcards)."""
    is_rank_stabilized: bool = False
    """Whether the scale is alpha / sqrt(rank) instead."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets:
            raise ConfigError(f"lora.targets needs at least one pattern of paths; {DECODER_PRODUCTS!r} is every product of the decoder")

    @property
    def scale(self) -> float:
        """Factor of the product that is added."""
        return self.alpha / (self.rank**0.5 if self.is_rank_stabilized else self.rank)
