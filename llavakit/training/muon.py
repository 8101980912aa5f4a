"""Muon: momentum whose updates are orthogonalised, for the matrices inside layers.

Owns: the Newton-Schulz iteration, run on all matrices of one shape together and in a dtype that the caller picks (torch.optim.Muon
takes them one by one and always in bfloat16, which costs twice as much on processors that are slow at it).
Source: K. Jordan and others, Muon (2024), with its coefficients; the step's length follows AdamW's root mean square
(J. Liu and others, arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["Muon", "orthogonalize"]

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_EPS = 1e-7
_RMS_OF_ADAMW = 0.2


class Muon(torch.optim.Optimizer):
    """Update 2-D parameters by their orthogonalised Nesterov momentum, with decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Take matrices; dtype is that of the orthogonalisation, parameters and momentum keep their own."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - the loss was computed before
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                updates = orthogonalize(torch.stack([self._momentum(weight, group["momentum"]) for weight in weights]).to(self._dtype))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                length = group["lr"] * _RMS_OF_ADAMW * math.sqrt(max(shape))
                torch._foreach_add_(weights, list(updates.to(weights[0].dtype)), alpha=-length)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        """Take the gradient into the running mean and return it as Nesterov looks ahead."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum_buffer"], momentum)


def orthogonalize(x_BMN: Tensor) -> Tensor:
    """Replace the singular values of each matrix by values around one (0.7 to 1.2), in x's dtype."""
    is_tall = x_BMN.shape[-2] > x_BMN.shape[-1]
    x = x_BMN.mT if is_tall else x_BMN
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if is_tall else x
