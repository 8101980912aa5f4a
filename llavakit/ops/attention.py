"""How attention sees the tokens: the Attention protocol, and Packed for training and scoring.

Owns: attention over packed tokens without padding. Refuses: caches (ops/cached) and batch shapes (pretrained/dense).
Invariant: a segment's result does not depend on the other segments; no T x T mask is ever built.
Legend: T tokens  N heads  K key-value heads  H head width  B segments
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Attention", "Packed", "causal_attention"]


class Attention(Protocol):
    """What a decoder layer needs: attention of its queries over whatever keys the context holds."""

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Return o_TNH; keys and values are those of the same T tokens, keys already rotated."""
        ...


class Packed:
    """Causal attention inside each segment of a packed batch."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        """Take cu_seqlens [B+1]: the starts of the segments and, last, T."""
        bounds = cu_seqlens.tolist()
        self.lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attend segment by segment."""
        segments = zip(q_TNH.split(self.lengths), k_TKH.split(self.lengths), v_TKH.split(self.lengths), strict=True)
        return torch.cat([causal_attention(q, k, v) for q, k, v in segments])


def causal_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    """Attend causally within one sequence; returns o_TNH."""
    q_1NTH, k_1KTH, v_1KTH = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    is_grouped = q_TNH.shape[1] != k_TKH.shape[1]
    o_1NTH = F.scaled_dot_product_attention(q_1NTH, k_1KTH, v_1KTH, is_causal=True, enable_gqa=is_grouped)
    return o_1NTH.squeeze(0).transpose(0, 1)
