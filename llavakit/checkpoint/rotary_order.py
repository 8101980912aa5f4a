"""The two orders of the rows of queries and keys, by how the rotary embedding turns a head.

Meta's files and GGUF files of Llama turn pairs of neighbouring rows, everyone else the two halves of a head.
Legend: H heads of this tensor  P pairs of a head  W 2  O rows out  I columns in
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["to_halves", "to_pairs"]


def to_halves(weight: Tensor, head_width: int) -> Tensor:
    """Put the rows of each head, [O, I] or a bias's [O], from neighbouring pairs into two halves."""
    rows_HPW: Tensor = weight.unflatten(0, (-1, head_width // 2, 2))
    return rows_HPW.transpose(1, 2).reshape(weight.shape)


def to_pairs(weight: Tensor, head_width: int) -> Tensor:
    """Put the rows of each head, [O, I] or a bias's [O], from two halves into neighbouring pairs."""
    rows_HWP: Tensor = weight.unflatten(0, (-1, 2, head_width // 2))
    return rows_HWP.transpose(1, 2).reshape(weight.shape)
