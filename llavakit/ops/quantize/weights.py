"""Weights quantised as they are loaded: int8 with a scale per row, and NF4, the 4-bit format of QLoRA, whose scales may be quantised too.

Owns: Quantized, quantize_int8, quantize_nf4, and dense, which turns their parts back into numbers. Reference in torch, for any device; a
weight is made dense where it is used, one at a time.
Invariants: all parts are integers, floats lie in them as bytes, so that no cast of a model rounds a scale; dense copies nothing between
host and device, and torch.compile traces it whole.
Source: bitsandbytes' quantize_4bit (levels, blocks of 64 along the rows, the first value in the high nibble) and, for scales of 8 bits,
its quantize_blockwise with the dynamic code book, as CUDA and its kernels for any device run it: the nearest level. Its library for CPUs
looks levels up on a grid of 2 / 65535 instead, and so takes the other neighbour for one scale in about 700.
Legend: O outputs  I inputs  B blocks of values  S blocks of scales  4 the bytes of a float32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KINDS", "Quantized", "dense", "quantize_int8", "quantize_nf4"]

_BLOCK, _NESTED_BLOCK = 64, 256
_LEAST = 1e-38
"""Least divisor: smaller values are as good as zero."""
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

    shape: tuple[int, int]
    codes: Tensor
    """int8 [O, I], or uint8 [B, 32] with two codes each."""
    scales: Tensor
    """uint8: float32 scales as bytes, [O, 4] or [B, 4], or codes of 8 bits [S, 256], of which the first B count."""
    nested: Tensor | None = None
    """uint8 [S + 1, 4]: the scale of each block of scales, and last what is added to all of them."""

    def stored(self) -> dict[str, Tensor]:
        """Return the parts that are the weight's own, by name."""
        return {"codes": self.codes, "scales": self.scales, **({} if self.nested is None else {"nested": self.nested})}

    def tables(self) -> dict[str, Tensor]:
        """Return the parts that all weights of its kind share: what codes stand for, as bytes."""
        tables = {}
        if self.codes.dtype == torch.uint8:
            levels, byte = torch.tensor(_NF4_LEVELS), torch.arange(256)
            tables["levels"] = torch.stack((levels[byte >> 4], levels[byte & 15]), -1)
        if self.nested is not None:
            tables["scale_levels"] = _dynamic_levels()[:, None]
        return {name: _to_bytes(table.to(self.codes.device)) for name, table in tables.items()}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the codes stand for, [O, I]."""
        return dense({**self.stored(), **self.tables()}, self.shape, dtype)

    @property
    def nbytes(self) -> int:
        """Memory of what is stored."""
        return sum(part.nbytes for part in self.stored().values())


def dense(parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight [O, I] that the parts of a Quantized, own and shared, stand for, rounded once, to dtype."""
    codes, scales = parts["codes"], parts["scales"]
    if "levels" not in parts:
        return (codes * _floats(scales)).to(dtype)
    scales_B1 = _floats(scales) if "nested" not in parts else _nested_scales(parts)[: codes.shape[0]]
    values = _floats(parts["levels"])[codes.int()].view(-1, _BLOCK)
    values *= scales_B1
    return values.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def _nested_scales(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the scales that codes of 8 bits stand for, [256 S, 1]."""
    nested_S1 = _floats(parts["nested"])
    values = _floats(parts["scale_levels"])[parts["scales"].int()].squeeze(-1) * nested_S1[:-1]
    return (values + nested_S1[-1]).view(-1, 1)


def quantize_int8(weight_OI: Tensor) -> Quantized:
    """Round each row to 255 levels between minus and plus its largest value."""
    weight_OI = weight_OI.float()
    most_O1 = weight_OI.abs().amax(1, keepdim=True)
    scales_O1 = most_O1 / torch.full_like(most_O1, 127)  # a GPU would multiply by the reciprocal of a plain number, which rounds otherwise
    codes_OI = (weight_OI / scales_O1.where(scales_O1 > 0, 1.0)).round().to(torch.int8)
    return Quantized(_shape(weight_OI), codes_OI, _to_bytes(scales_O1))


def quantize_nf4(weight_OI: Tensor, *, is_double: bool = False) -> Quantized:
    """Store blocks of 64 values, row after row, as the nearest of 16 levels times the block's largest value.

    is_double stores these scales in 8 bits: without their mean, in blocks of 256 with a scale of their own.
    """
    levels = torch.tensor(_NF4_LEVELS, device=weight_OI.device)
    codes, scales_B = _nearest(weight_OI.float().reshape(-1), _BLOCK, levels)
    high, low = codes.view(-1, _BLOCK // 2, 2).unbind(-1)
    packed = (high << 4) | low
    if not is_double:
        return Quantized(_shape(weight_OI), packed, _to_bytes(scales_B[:, None]))
    offset = scales_B.mean()
    scale_codes, nested_S = _nearest(scales_B - offset, _NESTED_BLOCK, _dynamic_levels().to(offset.device))
    return Quantized(_shape(weight_OI), packed, scale_codes, _to_bytes(torch.cat((nested_S, offset[None]))[:, None]))


def _nearest(values: Tensor, block: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Scale blocks of values by the largest of each, and return the numbers of the nearest levels [blocks, block], and the scales."""
    blocks = F.pad(values, (0, -values.numel() % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    middles = (levels[1:] + levels[:-1]) / 2
    scaled = blocks * (1 / scales.clamp(min=_LEAST))[:, None]  # not a quotient, which may round to the other side of a middle
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8), scales


def _dynamic_levels() -> Tensor:
    """Return the 256 levels of bitsandbytes' dynamic data type in order: 0, 1, and in each decade twice as many as in the one below."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    sizes = torch.cat(positive)
    return torch.cat((-sizes.flip(0), torch.zeros(1), sizes, torch.ones(1)))


def _to_bytes(values: Tensor) -> Tensor:
    """View a float32 matrix as bytes; what is on one row stays there."""
    return values.contiguous().view(torch.uint8)


def _floats(part: Tensor) -> Tensor:
    return part.view(torch.float32)


def _shape(weight_OI: Tensor) -> tuple[int, int]:
    rows, columns = weight_OI.shape
    return rows, columns


KINDS: Mapping[str, Callable[[Tensor], Quantized]] = {"int8": quantize_int8, "nf4": quantize_nf4}
