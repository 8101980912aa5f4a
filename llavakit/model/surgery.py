"""Changing a built model: fresh weights, and which of them train.

Owns: init_weights and freeze. Later fusing, quantising and LoRA join here; nothing else may touch a model's modules.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llavakit.errors import ConfigError

__all__ = ["TrainableRow", "freeze", "init_weights"]


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """One line of the table of what trains."""

    pattern: str
    num_tensors: int
    num_parameters: int


def init_weights(model: nn.Module, std: float, generator: torch.Generator) -> None:
    """Fill all parameters in place: norms one, biases zero, everything else normal(0, std)."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.zero_()
            elif "norm" in name.rsplit(".", 2)[-2]:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, std, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()


def freeze(model: nn.Module, trainable: Sequence[str]) -> list[TrainableRow]:
    """Let only parameters train whose name matches one of the patterns (shell wildcards).

    Returns a row per pattern. Raises: ConfigError when a pattern matches nothing.
    """
    parameters = dict(model.named_parameters())
    rows = []
    for pattern in trainable:
        matched = [weight for name, weight in parameters.items() if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"no parameter matches {pattern!r}; names look like {next(iter(parameters))!r}")
        rows.append(TrainableRow(pattern, len(matched), sum(weight.numel() for weight in matched)))
    for name, weight in parameters.items():
        weight.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in trainable))
    return rows
