"""Weights quantised as they are loaded: int8 with a scale per row, and NF4, the 4-bit format of QLoRA, its scales in 8 bits or not.

Owns: Quantized, quantize_int8, quantize_nf4, quantize_nested, and quantized_product, which keeps no dense weight for its gradient.
Reference in torch, for any device; values are turned back to the activations' dtype where they are used, one weight at a time.
Source: bitsandbytes' quantize_4bit (levels, blocks of 64 along the rows, the first value in the high nibble; scales less their mean in
blocks of 256, in its dynamic code book). Deviation: the nearest value of that book is taken, where bitsandbytes' CPU kernel sometimes
takes its neighbour.
Legend: O outputs  I inputs  S scales
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KINDS", "Quantized", "quantize_int8", "quantize_nested", "quantize_nf4", "quantized_product"]

NF4_BLOCK, NESTED_BLOCK = 64, 256
_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to 1: a value is stored as the number of the nearest one."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight [O, I] as small integers and scales."""

    kind: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    """codes: int8 [O, I], or uint8 with two codes each; scales: float32, one per row or block. Nested scales are scale_codes: uint8 [S],
    scale_peaks: float32, one per 256 of them, and scale_mean: float32 [1]."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the codes stand for, [O, I]."""
        codes, scales = self.tensors["codes"], self.scales()
        if self.kind == "int8":
            return (codes * scales).to(dtype)
        values = _pairs(codes.device)[codes.int()].view(-1, NF4_BLOCK)
        values *= scales[:, None]
        return values.view(-1)[: math.prod(self.shape)].view(self.shape).to(dtype)

    def scales(self) -> Tensor:
        """Return the scales in float32."""
        scales = self.tensors.get("scales")
        if scales is not None:
            return scales
        codes, peaks = self.tensors["scale_codes"], self.tensors["scale_peaks"]
        values = _scale_book(codes.device)[codes.int()] * peaks.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
        return values + self.tensors["scale_mean"]

    @property
    def nbytes(self) -> int:
        """Memory of codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def quantized_product(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """Multiply [..., I] by a weight, differentiable in x and bias; the weight is made dense again for the gradient."""
    return _Product.apply(x, bias, weight.kind, weight.shape, tuple(weight.tensors), *weight.tensors.values())  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, kind: str, shape: tuple[int, int], names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.kind, ctx.shape, ctx.names = kind, shape, names
        weight = Quantized(kind, shape, dict(zip(names, tensors, strict=True)))
        return F.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight = Quantized(ctx.kind, ctx.shape, dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        grad_x = grad @ weight.dense(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None, *(None for _ in ctx.names)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two values of each byte, [256, 2]."""
    codes = torch.arange(256)
    return torch.tensor(_NF4_LEVELS)[torch.stack((codes >> 4, codes & 15), -1)].to(device)


@functools.cache
def _scale_book(device: torch.device) -> Tensor:
    """Return the 256 values of the dynamic code book: seven powers of ten, each with twice as many steps as the one below."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        steps = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*steps, *(-step for step in steps)]
    return torch.tensor(sorted(values), device=device)


def quantize_int8(weight_OI: Tensor) -> Quantized:
    """Round each row to 255 levels between minus and plus its largest value."""
    weight_OI = weight_OI.float()
    most_O1 = weight_OI.abs().amax(1, keepdim=True)
    scales_O1 = most_O1 / torch.full_like(most_O1, 127)  # a GPU would multiply by the reciprocal of a plain number, which rounds otherwise
    codes_OI = (weight_OI / scales_O1.where(scales_O1 > 0, 1.0)).round().to(torch.int8)
    return Quantized("int8", _shape(weight_OI), {"codes": codes_OI, "scales": scales_O1})


def quantize_nf4(weight_OI: Tensor) -> Quantized:
    """Store blocks of 64 values, row after row, as the nearest of 16 levels times the block's largest value."""
    flat = weight_OI.float().reshape(-1)
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(_NF4_LEVELS, device=flat.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.where(scales > 0, 1.0)[:, None], middles).to(torch.uint8)
    high, low = codes.view(-1, 2).unbind(1)
    return Quantized("nf4", _shape(weight_OI), {"codes": (high << 4) | low, "scales": scales})


def quantize_nested(weight_OI: Tensor) -> Quantized:
    """Store NF4 whose scales are 8-bit codes as well: 4.13 bits a value in place of 4.5."""
    plain = quantize_nf4(weight_OI)
    scales = plain.tensors["scales"]
    mean = scales.mean()
    blocks = F.pad(scales - mean, (0, -scales.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    peaks, book = blocks.abs().amax(1), _scale_book(scales.device)
    codes = torch.bucketize(blocks / peaks.where(peaks > 0, 1.0)[:, None], (book[1:] + book[:-1]) / 2).to(torch.uint8)
    nested = {"scale_codes": codes.view(-1)[: scales.numel()].clone(), "scale_peaks": peaks, "scale_mean": mean.view(1)}
    return Quantized("nf4", plain.shape, {"codes": plain.tensors["codes"], **nested})


def _shape(weight_OI: Tensor) -> tuple[int, int]:
    rows, columns = weight_OI.shape
    return rows, columns


KINDS: Mapping[str, Callable[[Tensor], Quantized]] = {"int8": quantize_int8, "nf4": quantize_nf4, "nf4_nested": quantize_nested}
