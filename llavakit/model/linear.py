"""The dtype rule of the whole project in one place: a weight is cast to its input's dtype where it is used.

Owns: Linear, PackedLinear, QuantizedLinear, RMSNorm, LayerNorm, Embedding. They come uninitialised: surgery.init_weights fills a fresh
model, a checkpoint fills a loaded one, and nothing is computed twice (or on the meta device, which would import a compiler). Trainable
weights may be float32 while activations are bfloat16; there is no autocast. The casts cost nothing when the dtypes agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.ops.matmul import PackedWeight
from llavakit.ops.quantize.weights import Quantized, dense

__all__ = ["Embedding", "LayerNorm", "Linear", "PackedLinear", "QuantizedLinear", "RMSNorm"]


class Linear(nn.Linear):
    """nn.Linear whose weight and bias follow the input's dtype."""

    @property
    def num_slices(self) -> int:
        """From how many slices of its inputs the product is summed."""
        return 1

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the result has the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class PackedLinear(nn.Module):
    """A product on the CPU whose rows do not depend on each other, bit for bit (where is_steady): inference only.

    Several slices are summed in order, each rounded to the activations' dtype (config.pretraining_tp).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, num_slices: int = 1) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        first, *others = weight.chunk(num_slices, 1)
        self.bias = None if bias is None or not others else bias.detach()
        self.slices = [PackedWeight(first, bias if not others else None), *(PackedWeight(part) for part in others)]
        self.is_steady = all(part.is_steady for part in self.slices)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [..., in_features] of the weight's dtype."""
        x_MI = input.reshape(-1, self.in_features)
        first, *others = x_MI.chunk(len(self.slices), -1)
        y_MO = self.slices[0].multiply(first)
        for part, weight in zip(others, self.slices[1:], strict=True):
            y_MO = y_MO + weight.multiply(part)
        if self.bias is not None:  # of several slices; one adds its own
            y_MO = y_MO + self.bias
        return y_MO.view(*input.shape[:-1], -1)


class QuantizedLinear(nn.Module):
    """A product with a frozen weight of small integers, which is made dense for the time of each use, in backward again.

    Its parts are frozen parameters, and tables that no checkpoint holds, all of them integers: what casts a model, or shards it, moves
    them and rounds nothing. Gradients reach the input and the bias.
    """

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        self.shape = self.out_features, self.in_features = weight.shape
        stored, tables = weight.stored(), weight.tables()
        self.part_names = (*stored, *tables)
        for name, part in stored.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the result has the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        parts = [getattr(self, name) for name in self.part_names]
        output: Tensor = _QuantizedProduct.apply(input, bias, self.shape, self.part_names, *parts)  # type: ignore[no-untyped-call]
        return output


class _QuantizedProduct(torch.autograd.Function):
    """x w^T + bias, which keeps the parts of w for the backward pass, not w."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, shape: tuple[int, int], names: tuple[str, ...], *parts: Tensor) -> Tensor:
        ctx.shape, ctx.names, ctx.dtype = shape, names, input.dtype
        ctx.save_for_backward(*parts)
        return F.linear(input, dense(dict(zip(names, parts, strict=True)), shape, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            parts = map(_disguised, ctx.saved_tensors)
            grad_input = grad @ dense(dict(zip(ctx.names, parts, strict=True)), ctx.shape, ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_input, grad_bias, None, None, *(None for _ in ctx.names)


def _disguised(part: Tensor) -> Tensor:
    """Return the same integers in a way that a compiler does not see through: it would keep the dense weight that forward made of them."""
    return part | 0


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
