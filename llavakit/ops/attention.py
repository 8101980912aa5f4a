"""How attention sees the tokens: the Attention protocol, and Packed for training and scoring.

Owns: attention over packed tokens without padding, and the one call of torch's fused kernel that trains.
Refuses: caches (ops/cached) and batch shapes (pretrained/dense).
Invariant: a segment's result does not depend on the other segments; no T x T mask is ever built.
Legend: T tokens  N heads  K key-value heads  H head width  B segments
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Attention", "Packed", "causal_attention", "fused_attention"]


class Attention(Protocol):
    """What a decoder layer needs: attention of its queries over whatever keys the context holds."""

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Return o_TNH; keys and values are those of the same T tokens, keys already rotated."""
        ...


class Packed:
    """Causal attention inside each segment of a packed batch."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        """Take cu_seqlens [B+1]: the starts of the segments and, last, T."""
        self.lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:  # noqa: ARG002 - nothing is kept per layer
        """Attend segment by segment."""
        segments = zip(q_TNH.split(self.lengths), k_TKH.split(self.lengths), v_TKH.split(self.lengths), strict=True)
        return torch.cat([causal_attention(q, k, v) for q, k, v in segments])


def causal_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    """Attend causally within one sequence; returns o_TNH."""
    q_1NTH, k_1KTH, v_1KTH = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    return fused_attention(q_1NTH, k_1KTH, v_1KTH, is_causal=True).squeeze(0).transpose(0, 1)


def fused_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, is_causal: bool = False) -> Tensor:
    """Attend with torch's fused kernel; returns o_BNTH in q's dtype.

    On a CPU half-precision inputs are attended to in float32: forward and backward with the casts are 2.4 (65 tokens) to 0.9
    (600 tokens) times as fast as the half-precision kernel, and more exact (benchmarks/results/choices.json).
    """
    dtype, is_grouped = q_BNTH.dtype, q_BNTH.shape[1] != k_BKTH.shape[1]
    if q_BNTH.device.type == "cpu" and dtype.itemsize < torch.float32.itemsize:
        q_BNTH, k_BKTH, v_BKTH = q_BNTH.float(), k_BKTH.float(), v_BKTH.float()
    return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=is_causal, enable_gqa=is_grouped).to(dtype)
