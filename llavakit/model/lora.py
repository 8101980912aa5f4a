"""LoRA beside a model's weights: several adapters at once, each for its own rows of a batch.

Owns: Lora (one adapter, ready to run), AdaptedLinear, and Adapting, which says whose rows these are. Refuses: files (checkpoint/factors)
and training. Wrapping is surgery.adapt's.
Legend: R rank  I columns in  O rows out  M rows
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from llavakit.model.linear import Linear, PackedLinear, QuantizedLinear

__all__ = ["AdaptedLinear", "Adapting", "Lora"]


class Lora:
    """One adapter: for each product that it changes, two thin ones whose result is added."""

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype, device: torch.device) -> None:
        """Take factors (a_RI, b_OR, scale included) by the names of the modules that they change."""
        self.products = {name: tuple(_product(factor.to(device, dtype)) for factor in pair) for name, pair in factors.items()}

    def added(self, name: str, x: Tensor) -> Tensor | None:
        """Return what is added to a module's result for x [..., I]; None where it is left alone."""
        products = self.products.get(name)
        if products is None:
            return None
        a, b = products
        return b(a(x))


class Adapting:
    """Which rows go through which adapters; between uses none do."""

    def __init__(self) -> None:
        self.active: Sequence[tuple[Tensor | None, Lora]] = ()

    @contextlib.contextmanager
    def using(self, active: Sequence[tuple[Tensor | None, Lora]]) -> Iterator[None]:
        """Send rows_M of all inputs, or every row for None, through each adapter."""
        self.active = active
        try:
            yield
        finally:
            self.active = ()


class AdaptedLinear(nn.Module):
    """A product, or several of one input beside one another, with the adapters that are in use."""

    def __init__(self, base: Linear | PackedLinear | QuantizedLinear, parts: Mapping[str, int], adapting: Adapting) -> None:
        """Take how many of the outputs belong to which name, in order."""
        super().__init__()
        self.base, self.adapting = base, adapting
        self.shapes = {name: (num_outputs, base.in_features) for name, num_outputs in parts.items()}

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [M, I], or [..., I] where one adapter has every row."""
        output: Tensor = self.base(input)
        for rows_M, lora in self.adapting.active:
            chosen = input if rows_M is None else input[rows_M]
            begin = 0
            for name, (num_outputs, _) in self.shapes.items():
                part = output[..., begin : begin + num_outputs]
                begin += num_outputs
                added = lora.added(name, chosen)
                if added is not None and rows_M is None:
                    part += added
                elif added is not None:
                    part[rows_M] += added
        return output


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    if weight.device.type == "cpu":
        return PackedLinear(weight.contiguous(), None)
    layer = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return layer
