"""The projector between tower and language model: mlpNx_gelu.

Owns: N linear layers with exact (erf) gelu between them, named linear_1 ... linear_N as in llava-hf files.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.model.config import LlavaConfig
from llavakit.model.linear import Linear

__all__ = ["MultiModalProjector"]


class MultiModalProjector(nn.Module):
    """Map tower features to the language model's width, row by row."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.depth = config.projector_depth
        for index in range(1, self.depth + 1):
            width = config.vision_config.hidden_size if index == 1 else config.text_config.hidden_size
            self.add_module(f"linear_{index}", Linear(width, config.text_config.hidden_size, bias=config.multimodal_projector_bias))

    def forward(self, features_FD: Tensor) -> Tensor:
        """Project features [..., tower width] to [..., model width]."""
        h = self.get_submodule("linear_1")(features_FD)
        for index in range(2, self.depth + 1):
            h = self.get_submodule(f"linear_{index}")(F.gelu(h))
        return h  # type: ignore[no-any-return]
