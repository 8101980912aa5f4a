"""The dtype rule of the whole project in one place: a weight is cast to its input's dtype where it is used.

Owns: Linear, RMSNorm, LayerNorm, Embedding. They come uninitialised: surgery.init_weights fills a fresh model, a checkpoint
fills a loaded one, and nothing is computed twice (or on the meta device, which would import a compiler). Trainable weights may be
float32 while activations are bfloat16; there is no autocast. The casts cost nothing when the dtypes agree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Embedding", "LayerNorm", "Linear", "RMSNorm"]


class Linear(nn.Linear):
    """nn.Linear whose weight and bias follow the input's dtype."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the result has the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class RMSNorm(nn.Module):
    """Root mean square norm in float32; the result is cast back before the weight is applied, as in Llama."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalise the last axis."""
        h_TD = x_TD.float()
        h_TD = h_TD * torch.rsqrt(h_TD.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x_TD.dtype) * h_TD.to(x_TD.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weight and bias follow the input's dtype."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(input, self.normalized_shape, self.weight.to(input.dtype), self.bias.to(input.dtype), self.eps)


class Embedding(nn.Embedding):
    """nn.Embedding without its own initialisation."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""
