"""LoRA in training: a frozen product and the two thin ones that train beside it.

Owns: LoraLinear, and switching all of a model's off for a while. Wrapping and merging are surgery's (add_lora, merge_lora), files are
checkpoint/adapter_save's. lora (beside this) runs finished adapters.
Source: arXiv 2106.09685; initialised as peft does.
Legend: R rank  I columns in  O rows out
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.model.linear import Linear, QuantizedLinear
from llavakit.model.lora_config import LoraConfig

__all__ = ["LoraLinear", "adapters_off", "lora_layers"]


class LoraLinear(nn.Module):
    """base(x) + scale * b(a(dropout(x))); a and b are float32 and follow the input's dtype, as all weights do."""

    def __init__(self, base: Linear | QuantizedLinear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.config, self.is_on = base, config, True
        self.in_features, self.out_features = base.in_features, base.out_features
        device = next(base.parameters()).device
        lora_A = torch.empty(config.rank, base.in_features)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the result has the input's dtype."""
        output: Tensor = self.base(input)
        if not self.is_on:
            return output
        x = F.dropout(input, self.config.dropout, training=self.training)
        return output + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.config.scale

    def merged(self) -> Tensor:
        """Return the weight that does the same alone, [O, I], summed in float32, in the base's dtype. Only for a dense base."""
        assert isinstance(self.base, Linear), "a quantised weight cannot take a sum"
        added = self.lora_B.float() @ self.lora_A.float() * self.config.scale
        return (self.base.weight.float() + added).to(self.base.weight.dtype)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return a model's adapted products by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model answer as it did before it was adapted."""
    adapted = list(lora_layers(model).values())
    for product in adapted:
        product.is_on = False
    try:
        yield
    finally:
        for product in adapted:
            product.is_on = True
