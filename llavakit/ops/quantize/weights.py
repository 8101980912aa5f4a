"""Weights quantised as they are loaded: int8 with a scale per row, and NF4, the 4-bit format of QLoRA.

Owns: Quantized, quantize_int8, quantize_nf4. Reference in torch, for any device; values are turned back to the activations' dtype where
they are used, one weight at a time. Source: bitsandbytes' quantize_4bit (levels, blocks of 64 along the rows, the first value in the
high nibble).
Legend: O outputs  I inputs
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KINDS", "Quantized", "quantize_int8", "quantize_nf4"]

NF4_BLOCK = 64
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
    codes: Tensor
    """int8 [O, I], or uint8 with two codes each."""
    scales: Tensor
    """float32: [O, 1], or one per block."""
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the codes stand for, [O, I]."""
        if self.kind == "int8":
            return (self.codes * self.scales).to(dtype)
        values = _pairs(self.codes.device)[self.codes.int()].view(-1, NF4_BLOCK)
        values *= self.scales[:, None]
        return values.view(-1)[: math.prod(self.shape)].view(self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        """Memory of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two values of each byte, [256, 2]."""
    codes = torch.arange(256)
    return torch.tensor(_NF4_LEVELS)[torch.stack((codes >> 4, codes & 15), -1)].to(device)


def quantize_int8(weight_OI: Tensor) -> Quantized:
    """Round each row to 255 levels between minus and plus its largest value."""
    weight_OI = weight_OI.float()
    most_O1 = weight_OI.abs().amax(1, keepdim=True)
    scales_O1 = most_O1 / torch.full_like(most_O1, 127)  # a GPU would multiply by the reciprocal of a plain number, which rounds otherwise
    codes_OI = (weight_OI / scales_O1.where(scales_O1 > 0, 1.0)).round().to(torch.int8)
    return Quantized("int8", codes_OI, scales_O1, _shape(weight_OI))


def quantize_nf4(weight_OI: Tensor) -> Quantized:
    """Store blocks of 64 values, row after row, as the nearest of 16 levels times the block's largest value."""
    flat = weight_OI.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(_NF4_LEVELS, device=flat.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.where(scales > 0, 1.0)[:, None], middles).to(torch.uint8)
    high, low = codes.view(-1, 2).unbind(1)
    return Quantized("nf4", (high << 4) | low, scales, _shape(weight_OI))


def _shape(weight_OI: Tensor) -> tuple[int, int]:
    rows, columns = weight_OI.shape
    return rows, columns


KINDS: Mapping[str, Callable[[Tensor], Quantized]] = {"int8": quantize_int8, "nf4": quantize_nf4}
