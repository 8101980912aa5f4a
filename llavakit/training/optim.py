"""Optimisers and learning-rate schedules.

Owns: which parameter goes to which optimiser and group, the schedule as a pure function of the step, clipping.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from llavakit.errors import ConfigError
from llavakit.training.adam import HalfStateAdamW
from llavakit.training.config import OptimConfig
from llavakit.training.muon import Muon

__all__ = ["TrainedGroup", "build_optimizers", "clip_gradients", "lr_scale", "plan_groups", "set_lr"]

_PEAK = "peak_lr"


@dataclass(frozen=True, slots=True)
class TrainedGroup:
    """Parameters that are updated alike."""

    pattern: str
    """Pattern of the config that they matched; * for the rest."""
    names: tuple[str, ...]
    lr: float
    """At the peak."""
    weight_decay: float


def plan_groups(parameters: Mapping[str, Parameter], config: OptimConfig) -> list[TrainedGroup]:
    """Sort the trainable parameters into groups; vectors get no weight decay. Raises: ConfigError when a pattern matches nothing."""
    kinds = [(group.pattern, group.lr, group.weight_decay) for group in config.groups] + [("*", config.lr, None)]
    groups: dict[tuple[int, bool], list[str]] = {}
    for name, weight in parameters.items():
        kind = next(place for place, (pattern, _, _) in enumerate(kinds) if fnmatch.fnmatchcase(name, pattern))
        groups.setdefault((kind, weight.dim() > 1), []).append(name)
    matched = {kind for kind, _ in groups}
    for place, (pattern, _, _) in enumerate(kinds[:-1]):
        if place not in matched:
            raise ConfigError(f"optim.groups: no trainable parameter is left for {pattern!r}; see the patterns before it, and trainable")
    planned = []
    for (kind, is_matrix), names in sorted(groups.items()):
        pattern, lr, decay = kinds[kind]
        weight_decay = (config.weight_decay if decay is None else decay) if is_matrix else 0.0
        planned.append(TrainedGroup(pattern, tuple(names), lr, weight_decay))
    return planned


def build_optimizers(
    parameters: Mapping[str, Parameter], config: OptimConfig, *, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Build the optimisers over the trainable parameters; Muon orthogonalises in dtype. Raises: ConfigError."""
    matrices = {name for name, weight in parameters.items() if config.name == "muon" and weight.dim() == 2 and ".layers." in name}
    planned = plan_groups({name: weight for name, weight in parameters.items() if name not in matrices}, config)
    groups = [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay, "lr": group.lr, _PEAK: group.lr}
        for group in planned
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = []
    if groups and config.states == "bfloat16":
        optimizers.append(HalfStateAdamW(groups, lr=config.lr, betas=betas, eps=config.eps))
    elif groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True))
    if matrices:
        inner = [weight for name, weight in parameters.items() if name in matrices]
        muon = Muon(inner, lr=config.lr, weight_decay=config.weight_decay, dtype=dtype)
        muon.param_groups[0][_PEAK] = config.lr
        optimizers.append(muon)
    return optimizers


def lr_scale(config: OptimConfig, step: int, steps: int) -> float:
    """Return the share of the peak learning rate in step (from 0) of steps."""
    warmup = config.warmup_steps or math.ceil(config.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    match config.schedule:
        case "constant":
            return 1.0
        case "wsd":
            left = min(1.0, (1 - progress) / config.decay_share) if config.decay_share else 1.0
        case "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
    return config.final_lr_share + (1 - config.final_lr_share) * left


def set_lr(optimizers: Sequence[torch.optim.Optimizer], scale: float) -> None:
    """Set every group's learning rate to this share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[_PEAK] * scale


def clip_gradients(parameters: Sequence[Parameter], max_norm: float | None) -> Tensor:
    """Return the gradient's norm, after scaling the gradient down to max_norm where it is longer."""
    limit = math.inf if max_norm is None else max_norm
    return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
