"""The one table of packed weights: integers of few bits that share words of 32, with a scale and a zero for each group of inputs.

Owns: PackedLayout with its reference pack and unpack, LAYOUTS, num_groups, dequantize. Invariants: packing loses nothing in either
direction; dequantize holds the words, the dense weight and a few rows of codes.
Legend: I inputs  O outputs  G groups of inputs  W words  V values of a block
Sources: AutoGPTQ's QuantLinear.pack and forward, GPTQModel's convert_gptq_v1_to_v2_format, AutoAWQ's WQLinear_GEMM.from_linear and
dequantize_gemm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "PackedLayout", "dequantize", "num_groups"]

_WORD_BITS = 32
_ROWS = 256
"""Inputs that dequantize unpacks at once: whole blocks of any layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayout:
    """How codes [I, O] and zeros [G, O], integers below 2**bits, lie in words of 32 bits.

    A block of values fills whole words; its first value has the lowest bits, and one that does not end in a word goes on in the next.
    """

    bits: int
    weight_axis: int
    """The axis of [I, O] along which codes share words. Zeros share theirs along the outputs."""
    order: tuple[int, ...]
    """Which of its values a block holds first, second, ..."""
    zero_offset: int = 0
    """What a stored zero is less than the zero, modulo 2**bits.

    So the highest stored value is a zero of 0, as in AutoGPTQ's qlinear_cuda_old for 2, 4 and 8 bits. Its code for 3 bits, and
    qlinear_cuda, mask before they add 1 and make 2**bits of it; its own packing of a zero of 0 overwrites the zeros behind it in the word.
    """
    has_carry: bool = False
    """Whether a zero of 0 also lessens what the next zero of its block stores: GPTQModel takes the offset off whole words."""
    has_group_index: bool = False
    """Whether g_idx [I] may name the group of each input; without it groups are runs of inputs."""

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def block_words(self) -> int:
        """Words of a block."""
        return len(self.order) * self.bits // _WORD_BITS

    def pack(self, codes_IO: Tensor) -> Tensor:
        """Pack codes, uint8 [I, O], into int32 words; the packed axis holds whole blocks."""
        return self._pack(codes_IO, self.weight_axis)

    def unpack(self, words: Tensor) -> Tensor:
        """Return the codes of int32 words, uint8 [I, O]."""
        return self._unpack(words, self.weight_axis)

    def pack_zeros(self, zeros_GO: Tensor) -> Tensor:
        """Pack zeros, uint8 [G, O], into int32 words [G, W]."""
        return self._pack(self._shifted(zeros_GO, -self.zero_offset), 1)

    def unpack_zeros(self, words_GW: Tensor) -> Tensor:
        """Return the zeros of int32 words, uint8 [G, O]."""
        return self._shifted(self._unpack(words_GW, 1), self.zero_offset)

    def num_values(self, num_words: int) -> int:
        """Count the values in words of whole blocks."""
        return num_words // self.block_words * len(self.order)

    def _pack(self, values: Tensor, axis: int) -> Tensor:
        num_values = values.shape[axis]
        assert num_values % len(self.order) == 0, "blocks are whole"
        assert values.numel() == 0 or int(values.max()) <= self.max_code, "values fit their bits"
        shape = list(values.shape)
        shape[axis] = num_values // len(self.order) * self.block_words
        words = torch.zeros(shape, dtype=torch.int32)
        values_VX, words_WX = values.movedim(axis, 0), words.movedim(axis, 0)
        for place, value in enumerate(self.order):
            word, shift = divmod(place * self.bits, _WORD_BITS)
            part = values_VX[value :: len(self.order)].int()
            words_WX[word :: self.block_words] |= part << shift
            if shift + self.bits > _WORD_BITS:
                words_WX[word + 1 :: self.block_words] |= part >> (_WORD_BITS - shift)
        return words

    def _unpack(self, words: Tensor, axis: int) -> Tensor:
        shape = list(words.shape)
        shape[axis] = self.num_values(shape[axis])
        values = torch.empty(shape, dtype=torch.uint8)
        values_VX, words_WX = values.movedim(axis, 0), words.movedim(axis, 0)
        for place, value in enumerate(self.order):
            word, shift = divmod(place * self.bits, _WORD_BITS)
            part = words_WX[word :: self.block_words] >> shift
            if (num_low := _WORD_BITS - shift) < self.bits:
                part = part & (2**num_low - 1) | words_WX[word + 1 :: self.block_words] << num_low
            values_VX[value :: len(self.order)] = part & self.max_code  # >> repeats the sign
        return values

    def _shifted(self, zeros_GO: Tensor, offset: int) -> Tensor:
        """Add offset to each zero."""
        if not self.has_carry:
            return (zeros_GO.int() + offset & self.max_code).to(zeros_GO.dtype)
        shifted_GO = torch.empty_like(zeros_GO)
        carry: Tensor | int = 0
        for value in self.order:
            total = zeros_GO[:, value :: len(self.order)].int() + offset + carry
            shifted_GO[:, value :: len(self.order)] = total & self.max_code
            carry = total >> self.bits
        return shifted_GO


def _gptq(bits: int, *, zero_offset: int, has_carry: bool = False) -> PackedLayout:
    order = tuple(range(math.lcm(bits, _WORD_BITS) // bits))
    return PackedLayout(bits=bits, weight_axis=0, order=order, zero_offset=zero_offset, has_carry=has_carry, has_group_index=True)


LAYOUTS: Mapping[tuple[str, str, int], PackedLayout] = {
    **{("gptq", "gptq", bits): _gptq(bits, zero_offset=1) for bits in (2, 3, 4, 8)},
    **{("gptq", "gptq by GPTQModel", bits): _gptq(bits, zero_offset=1, has_carry=True) for bits in (2, 4, 8)},
    **{("gptq", "gptq_v2", bits): _gptq(bits, zero_offset=0) for bits in (2, 3, 4, 8)},
    ("awq", "gemm", 4): PackedLayout(bits=4, weight_axis=1, order=(0, 2, 4, 6, 1, 3, 5, 7)),
}
"""By method, its version, and bits."""


def num_groups(num_inputs: int, group_size: int) -> int:
    """Count the groups of inputs; -1 makes one of them all."""
    return 1 if group_size == -1 else -(-num_inputs // group_size)


def dequantize(layout: PackedLayout, words: Tensor, zero_words_GW: Tensor, scales_GO: Tensor, groups_I: Tensor) -> Tensor:
    """Return the dense weight [O, I]: scale * (code - zero), rounded once, to the scales' dtype.

    groups_I names the group of each input. Differences are exact in every dtype: they have at most 8 bits and a sign.
    """
    num_inputs, num_outputs = len(groups_I), scales_GO.shape[1]
    zeros_GO = layout.unpack_zeros(zero_words_GW).short()
    weight_OI = torch.empty(num_outputs, num_inputs, dtype=scales_GO.dtype)
    for start in range(0, num_inputs, _ROWS):
        stop = min(start + _ROWS, num_inputs)
        first, last = (words.shape[0] * row // num_inputs for row in (start, stop))
        groups = groups_I[start:stop]
        differences = layout.unpack(words[first:last]).short() - zeros_GO[groups]
        weight_OI[:, start:stop] = (differences.to(scales_GO.dtype) * scales_GO[groups]).T
    return weight_OI
