"""How attention sees the tokens: the Attention protocol, and Packed for training and scoring.

Owns: attention over packed tokens without padding, and the one call of torch's fused kernel that trains.
Refuses: caches (ops/paged) and batch shapes (pretrained/dense).
Invariant: a segment's result does not depend on the other segments; a T x T mask is built only for rows longer than a window.
Legend: T tokens  N heads  K key-value heads  H head width  B segments
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Attention", "Packed", "causal_attention", "causal_rows", "fused_attention"]


class Attention(Protocol):
    """What a decoder layer needs: attention of its queries over whatever keys the context holds."""

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Return o_TNH; keys and values are those of the same T tokens, keys already rotated."""
        ...


class Packed:
    """Causal attention inside each segment of a packed batch."""

    def __init__(self, cu_seqlens: Tensor, window: int | None = None) -> None:
        """Take cu_seqlens [B+1]: the starts of the segments and, last, T; and how many positions a token sees (None: all before)."""
        self.lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
        self.window = window

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:  # noqa: ARG002 - nothing is kept per layer
        """Attend segment by segment."""
        segments = zip(q_TNH.split(self.lengths), k_TKH.split(self.lengths), v_TKH.split(self.lengths), strict=True)
        return torch.cat([causal_attention(q, k, v, window=self.window) for q, k, v in segments])


def causal_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, window: int | None = None) -> Tensor:
    """Attend causally within one sequence, over the last window positions; returns o_TNH."""
    q_1NTH, k_1KTH, v_1KTH = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    return causal_rows(q_1NTH, k_1KTH, v_1KTH, window=window).squeeze(0).transpose(0, 1)


def causal_rows(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, window: int | None = None) -> Tensor:
    """Attend causally within rows of one length; returns o_BNTH."""
    length = q_BNTH.shape[2]
    if window is None or length <= window:
        return fused_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True)
    seen_TT = torch.ones(length, length, dtype=torch.bool, device=q_BNTH.device).tril().triu(1 - window)
    return fused_attention(q_BNTH, k_BKTH, v_BKTH, mask=seen_TT)


def fused_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Attend with torch's fused kernel; returns o_BNTH in q's dtype.

    On a CPU half-precision inputs are attended to in float32: forward and backward with the casts are 2.4 (65 tokens) to 0.9
    (600 tokens) times as fast as the half-precision kernel, and more exact (benchmarks/results/choices.json).
    """
    dtype, is_grouped = q_BNTH.dtype, q_BNTH.shape[1] != k_BKTH.shape[1]
    if q_BNTH.device.type == "cpu" and dtype.itemsize < torch.float32.itemsize:
        q_BNTH, k_BKTH, v_BKTH = q_BNTH.float(), k_BKTH.float(), v_BKTH.float()
    return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped).to(dtype)
