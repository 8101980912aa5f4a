"""LoRA that trains: a product with low-rank factors beside its frozen weight.

Owns: LoraLinear, and switching all of a model's off for a while (adapters_off). Refuses: adapters for inference, which are shared by a
batch's rows (model/lora). surgery.add_lora puts it in a model and surgery.merge_lora takes it out.
Invariants: factors are float32 parameters and follow the input's dtype where they are used, as all weights do; a fresh one adds nothing.
Source: peft's initialisation and order of products. Legend: R rank  I columns in  O rows out
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

__all__ = ["LoraLinear", "adapters_off"]


class LoraLinear(nn.Module):
    """base(x) + scale * B A dropout(x)."""

    def __init__(self, base: Linear | QuantizedLinear, config: LoraConfig, generator: torch.Generator) -> None:
        """Freeze base and draw A on the generator's device, so that it is the same on any."""
        super().__init__()
        self.base, self.config, self.is_on = base.requires_grad_(requires_grad=False), config, True
        self.out_features, self.in_features = base.out_features, base.in_features
        device = next(base.parameters()).device
        a_RI = torch.empty(config.rank, base.in_features, device=generator.device)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a_RI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the result has the input's dtype."""
        output: Tensor = self.base(input)
        if not self.is_on:
            return output
        dropped = F.dropout(input, self.config.dropout, self.training)
        low = F.linear(dropped, self.lora_A.to(input.dtype)) * self.config.scale
        return output + F.linear(low, self.lora_B.to(input.dtype))

    def merged_weight(self) -> Tensor:
        """Return base's weight with the product of the factors in it: summed in float32, in the weight's own dtype."""
        assert isinstance(self.base, Linear), "packed weights hold no sum"
        weight_OI = self.base.weight.detach()
        product_OI = self.lora_B.detach().float() @ self.lora_A.detach().float() * self.config.scale
        return (weight_OI.float() + product_OI).to(weight_OI.dtype)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model answer as it did before factors were added."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for product in adapted:
        product.is_on = False
    try:
        yield
    finally:
        for product in adapted:
            product.is_on = True
