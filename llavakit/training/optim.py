"""Optimisers and learning-rate schedules.

Owns: which parameter goes to which optimiser and group, the schedule as a pure function of the step, clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from llavakit.training.config import OptimConfig
from llavakit.training.muon import Muon

__all__ = ["build_optimizers", "clip_gradients", "lr_scale", "set_lr"]


def build_optimizers(
    parameters: Mapping[str, Parameter], config: OptimConfig, *, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Build the optimisers over the trainable parameters; vectors get no weight decay, Muon orthogonalises in dtype."""
    matrices = {name for name, weight in parameters.items() if config.name == "muon" and weight.dim() == 2 and ".layers." in name}
    decayed = [weight for name, weight in parameters.items() if name not in matrices and weight.dim() > 1]
    plain = [weight for name, weight in parameters.items() if name not in matrices and weight.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    if not matrices:
        return [adamw]
    inner = [weight for name, weight in parameters.items() if name in matrices]
    muon = Muon(inner, lr=config.lr, weight_decay=config.weight_decay, dtype=dtype)
    return [adamw, muon] if decayed or plain else [muon]


def lr_scale(config: OptimConfig, step: int, steps: int) -> float:
    """Return the share of the peak learning rate in step (from 0) of steps."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "wsd":
            left = min(1.0, (1 - progress) / config.decay_share) if config.decay_share else 1.0
        case "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
    return config.final_lr_share + (1 - config.final_lr_share) * left


def set_lr(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of all groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def clip_gradients(parameters: Sequence[Parameter], max_norm: float | None) -> Tensor:
    """Return the gradient's norm, after scaling the gradient down to max_norm where it is longer."""
    limit = math.inf if max_norm is None else max_norm
    return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
