"""The gate of SwiGLU, silu(gate) * up, in forms that give the same values.

Owns: silu_gate (torch's, differentiable) and steady_gate, whose elements do not depend on their places: torch's silu treats the last
elements of a stretch otherwise than the others, and where stretches end depends on how many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.cpu.library import load_kernels

__all__ = ["silu_gate", "steady_gate"]


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up by torch's operations."""
    return F.silu(gate) * up


def steady_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, every element the same in any company; CPU, no gradients."""
    kernels = load_kernels() if gate.dtype in (torch.float32, torch.bfloat16) else None
    if kernels is not None:
        return kernels.gate(gate, up)
    x = gate.float()
    return (x / (1 + (-x).exp())).to(gate.dtype) * up
