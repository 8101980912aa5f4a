"""Rotary position embedding, half-split as in the HF layout of Llama.

Owns: RopeSpec (frequencies, scaled or not) and rotation. Invariant: angles are computed in float32 on the device where they are
used, from the config alone, and never stored in a state dict.
Sources: linear interpolation (kaiokendev), dynamic NTK (bloc97 and emozilla) and Llama-3.1's scaling, as transformers computes them.
Deviation: dynamic scaling depends on the positions of this call alone; transformers also remembers the longest call before.
Legend: T tokens  N heads  H head width
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Rope", "RopeKind", "RopeSpec", "rope_tables", "rotate"]

Rope = tuple[Tensor, Tensor]
"""(cos_T1H, sin_T1H), cast to the activations' dtype."""
RopeKind = Literal["default", "linear", "dynamic", "llama3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Which frequencies a model rotates by."""

    head_dim: int
    theta: float
    """Base of the frequencies."""
    kind: RopeKind = "default"
    """linear stretches positions, dynamic raises the base beyond original_len, llama3 stretches long wavelengths only."""
    factor: float = 1.0
    """How many times longer the context became."""
    original_len: int = 0
    """Context length before scaling (dynamic, llama3)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_len / low_freq_factor are stretched by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_len / high_freq_factor are left alone."""

    def frequencies(self, positions_T: Tensor) -> Tensor:
        """Compute the head_dim / 2 angles per position step in float32; only dynamic scaling looks at the positions."""
        theta: float | Tensor = self.theta
        if self.kind == "dynamic":
            length = torch.clamp(positions_T.max() + 1, min=self.original_len)  # waits for no one: the maximum stays on the device
            stretch = self.factor * length / self.original_len - (self.factor - 1)
            theta = self.theta * stretch ** (self.head_dim / (self.head_dim - 2))
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=positions_T.device).float() / self.head_dim
        frequencies = 1.0 / theta**exponents
        match self.kind:
            case "linear":
                return frequencies / self.factor
            case "llama3":
                return self._llama3(frequencies)
        return frequencies

    def _llama3(self, frequencies: Tensor) -> Tensor:
        """Blend stretched and plain frequencies between the two wavelengths."""
        wavelengths = 2 * math.pi / frequencies
        plain_share = (self.original_len / wavelengths - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - plain_share) * frequencies / self.factor + plain_share * frequencies
        stretched = torch.where(wavelengths > self.original_len / self.low_freq_factor, frequencies / self.factor, blended)
        return torch.where(wavelengths < self.original_len / self.high_freq_factor, frequencies, stretched)


def rope_tables(positions_T: Tensor, spec: RopeSpec, dtype: torch.dtype) -> Rope:
    """Compute the cosines and sines of T positions."""
    angles = positions_T[:, None].float() * spec.frequencies(positions_T)
    angles_T1H = torch.cat((angles, angles), -1).unsqueeze(1)
    return angles_T1H.cos().to(dtype), angles_T1H.sin().to(dtype)


def rotate(x_TNH: Tensor, rope: Rope) -> Tensor:
    """Rotate each head's halves by the token's angles."""
    cos_T1H, sin_T1H = rope
    first, second = x_TNH.chunk(2, -1)
    return x_TNH * cos_T1H + torch.cat((-second, first), -1) * sin_T1H
