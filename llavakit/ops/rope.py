"""Rotary position embedding, half-split as in the HF layout of Llama.

Owns: frequencies and rotation. Invariant: angles are computed in float32 on the device where they are used, from the
config alone, and never stored in a state dict.
Legend: T tokens  N heads  H head width
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Rope", "rope_tables", "rotate"]

Rope = tuple[Tensor, Tensor]
"""(cos_T1H, sin_T1H), cast to the activations' dtype."""


def rope_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """Compute the cosines and sines of T positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions_T.device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    angles = positions_T[:, None].float() * frequencies
    angles_T1H = torch.cat((angles, angles), -1).unsqueeze(1)
    return angles_T1H.cos().to(dtype), angles_T1H.sin().to(dtype)


def rotate(x_TNH: Tensor, rope: Rope) -> Tensor:
    """Rotate each head's halves by the token's angles."""
    cos_T1H, sin_T1H = rope
    first, second = x_TNH.chunk(2, -1)
    return x_TNH * cos_T1H + torch.cat((-second, first), -1) * sin_T1H
