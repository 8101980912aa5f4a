"""The projector between tower and language model: linear (v1), mlpNx_gelu (v1.5 on), identity.

Owns: N linear layers with exact (erf) gelu between them, named linear_1 ... linear_N as in llava-hf files; none for identity.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.model.linear import Linear
from llavakit.model.llava_config import LlavaConfig

__all__ = ["MultiModalProjector"]


class MultiModalProjector(nn.Module):
    """Map tower features to the language model's width, row by row."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.depth = config.projector_depth
        for index in range(1, self.depth + 1):
            width = config.feature_width if index == 1 else config.text_config.hidden_size
            self.add_module(f"linear_{index}", Linear(width, config.text_config.hidden_size, bias=config.multimodal_projector_bias))

    def forward(self, features_FD: Tensor) -> Tensor:
        """Project features [..., feature width] to [..., model width]."""
        h = features_FD
        for index in range(1, self.depth + 1):
            h = self.get_submodule(f"linear_{index}")(h if index == 1 else F.gelu(h))
        return h
