"""AdamW whose moments are kept in bfloat16.

Owns: HalfStateAdamW. The arithmetic of a step is torch's AdamW in float32; only what is kept between steps is rounded, up or down by
chance in proportion to the distance, since to the nearest a second moment that changes by a thousandth a step would never change.
Invariant: what is drawn depends on seed, step and the parameter's place alone, so a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["HalfStateAdamW", "rounded_by_chance"]

_STRIDE = 1 << 20  # between the draws of neighbouring steps; no model has so many parameters


class HalfStateAdamW(torch.optim.Optimizer):
    """AdamW with exp_avg and exp_avg_sq in bfloat16."""

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "nothing here evaluates a model twice"
        place = 0
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad.float(), group, place)
                place += 1

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, dtype=torch.bfloat16)
        state["step"] += 1
        count, (beta1, beta2) = int(state["step"]), group["betas"]
        first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (second.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
        weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**count))
        generator = torch.Generator(weight.device).manual_seed(self._seed + count * _STRIDE + place)
        state["exp_avg"].copy_(rounded_by_chance(first, generator))
        state["exp_avg_sq"].copy_(rounded_by_chance(second, generator))


def rounded_by_chance(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 values, so that the mean of many draws is the value."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
