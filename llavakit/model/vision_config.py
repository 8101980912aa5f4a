"""Configurations of the vision towers: CLIP and SigLIP.

Owns: VisionConfig with its two kinds, TOWERS. Refuses: torch. Defaults are transformers', CLIP's those of the tower of LLaVA-1.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llavakit.config import ModelConfig, choice, integer, number, setting
from llavakit.errors import ConfigError
from llavakit.model.config import MAX_WIDTH, layers, width

__all__ = ["TOWERS", "ClipVisionConfig", "SiglipVisionConfig", "VisionConfig"]


@dataclass(kw_only=True, eq=False, init=False)
class VisionConfig(ModelConfig):
    """A vision transformer on square pictures; use one of its kinds."""

    has_cls: ClassVar[bool]
    """Whether a class token goes before the patches."""
    has_pre_norm: ClassVar[bool]
    """Whether the embeddings are normed before the first layer."""
    has_patch_bias: ClassVar[bool]
    """Whether the patch embedding has a bias."""

    hidden_size: int = width(1024)
    """Tower width."""
    intermediate_size: int = width(4096)
    """Width inside the feed-forward block."""
    num_hidden_layers: int = layers(24)
    """Layers in the checkpoint; only those that the features need are run."""
    num_attention_heads: int = layers(16)
    """Attention heads."""
    image_size: int = setting(336, integer(1, 8192), structural=True)
    """Side of the square input in pixels."""
    patch_size: int = setting(14, integer(1, 1024), structural=True)
    """Side of a patch in pixels."""
    num_channels: int = setting(3, integer(1, 16), structural=True)
    """Colour channels."""
    hidden_act: str = setting("quick_gelu", choice("quick_gelu", "gelu", "gelu_pytorch_tanh"), structural=True)
    """Activation of the feed-forward block: x sigmoid(1.702 x), exact gelu, or gelu by tanh."""
    layer_norm_eps: float = setting(1e-5, number(0.0, 1.0), structural=True)
    """Epsilon of the norms."""
    initializer_range: float = setting(0.02, number(0.0, 10.0))
    """Standard deviation of fresh weights."""

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def normalize(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Read sizes that are written as [side, side]. Raises: ConfigError for pictures that are not square."""
        values = dict(values)
        for name in ("image_size", "patch_size"):
            sides = values.get(name)
            if isinstance(sides, list | tuple):
                if not sides or any(side != sides[0] for side in sides):
                    raise ConfigError(f"{name} must be one side of a square, got {sides!r}")
                values[name] = sides[0]
        return values

    def validate(self) -> None:
        """Check divisibility. Raises: ConfigError."""
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} must not exceed image_size {self.image_size}")


@dataclass(kw_only=True, eq=False, init=False)
class ClipVisionConfig(VisionConfig):
    """A CLIP vision transformer."""

    model_type: ClassVar[str] = "clip_vision_model"
    has_cls, has_pre_norm, has_patch_bias = True, True, False

    projection_dim: int = setting(768, integer(1, MAX_WIDTH))
    """Width of CLIP's own projection; LLaVA does not use it."""


@dataclass(kw_only=True, eq=False, init=False)
class SiglipVisionConfig(VisionConfig):
    """A SigLIP vision transformer: no class token, no norm before the layers."""

    model_type: ClassVar[str] = "siglip_vision_model"
    has_cls, has_pre_norm, has_patch_bias = False, False, True

    hidden_size: int = width(768)
    intermediate_size: int = width(3072)
    num_hidden_layers: int = layers(12)
    num_attention_heads: int = layers(12)
    image_size: int = setting(224, integer(1, 8192), structural=True)
    patch_size: int = setting(16, integer(1, 1024), structural=True)
    hidden_act: str = setting("gelu_pytorch_tanh", choice("quick_gelu", "gelu", "gelu_pytorch_tanh"), structural=True)
    layer_norm_eps: float = setting(1e-6, number(0.0, 1.0), structural=True)


TOWERS: Mapping[str, type[VisionConfig]] = {cls.model_type: cls for cls in (ClipVisionConfig, SiglipVisionConfig)}
"""Tower configurations by model_type."""
