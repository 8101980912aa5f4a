"""Running a model that is larger than memory: each weight is there only while it computes.

Owns: streamed, which reads weights from an open checkpoint when their module is called, and forgets them after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.checkpoint.load import set_weight
from llavakit.checkpoint.opening import Checkpoint, Weight
from llavakit.model.decoder import TokenEmbedding
from llavakit.model.linear import LayerNorm, Linear, RMSNorm
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.vision import PatchEmbedding

__all__ = ["streamed"]

_UNITS = (Linear, RMSNorm, LayerNorm, TokenEmbedding, PatchEmbedding)
"""Modules that use their weights only while they are called."""


@contextlib.contextmanager
def streamed(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[LlamaCore | LlavaCore]:
    """Yield the checkpoint's core, whose weights come from its files in dtype, module by module, each time they are needed.

    Memory holds the largest module's. Calls raise CheckpointError as reading does.
    """
    core = checkpoint.core
    handles = []
    for name, module in core.named_modules():
        if isinstance(module, _UNITS):
            unit = _Unit(f"{name}.", checkpoint.weights, dtype)
            handles += [module.register_forward_pre_hook(unit.fill), module.register_forward_hook(unit.empty)]
    for name, _ in core.named_parameters(recurse=False):  # the newline, which has no module of its own
        setattr(core, name, nn.Parameter(checkpoint.weights[name].read(dtype), requires_grad=False))
    try:
        yield core.eval()
    finally:
        for handle in handles:
            handle.remove()


class _Unit:
    """A module whose weights come and go."""

    def __init__(self, prefix: str, weights: Mapping[str, Weight], dtype: torch.dtype) -> None:
        self._prefix, self._weights, self._dtype = prefix, weights, dtype
        self._empty: dict[str, nn.Parameter] = {}

    def fill(self, module: nn.Module, _: Any) -> None:
        """Read the weights."""
        self._empty = dict(module.named_parameters())
        for name in self._empty:
            set_weight(module, name, nn.Parameter(self._weights[self._prefix + name].read(self._dtype), requires_grad=False))

    def empty(self, module: nn.Module, _: Any, result: Tensor) -> Tensor:
        """Forget them."""
        for name, parameter in self._empty.items():
            set_weight(module, name, parameter)
        return result
