"""What LoRA adds to a model. Refuses: torch.

Owns: LoraConfig and the modules that LLaVA-1.5 adapts.
"""

from __future__ import annotations

from dataclasses import dataclass

from llavakit.errors import ConfigError

__all__ = ["DECODER_PRODUCTS", "LoraConfig"]

DECODER_PRODUCTS = ("*layers.*.self_attn.[qkvo]_proj", "*layers.*.mlp.*_proj")
"""Every product of the decoder's layers; not the head, the embedding, the projector or the tower, whose products have other names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Two thin trained products beside each frozen one."""

    rank: int
    """Their inner width."""
    alpha: float
    """Their result is multiplied by alpha / rank (alpha / sqrt(rank) where is_rank_stabilized)."""
    dropout: float = 0.0
    """Share of their inputs that is dropped in training."""
    targets: tuple[str, ...] = DECODER_PRODUCTS
    """Patterns (shell wildcards) of the whole paths of the modules that get them, all in the language model unless they say otherwise."""
    is_rank_stabilized: bool = False
    """Whether to divide by the rank's root (rsLoRA)."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1 or not self.targets:
            raise ConfigError(
                "lora needs a rank of at least 1, alpha above 0, dropout from 0 to below 1 and at least one target, "
                f"got {self.rank}, {self.alpha}, {self.dropout} and {self.targets}"
            )

    @property
    def scale(self) -> float:
        """What the result is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.is_rank_stabilized else self.rank)
