"""The dtype rule of the whole project in one place: a weight is cast to its input's dtype where it is used.

Owns: Linear, PackedLinear, QuantizedLinear, RMSNorm, LayerNorm, Embedding. They come uninitialised: surgery.init_weights fills a fresh
model, a checkpoint fills a loaded one, and nothing is computed twice (or on the meta device, which would import a compiler). Trainable
weights may be float32 while activations are bfloat16; there is no autocast. The casts cost nothing when the dtypes agree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.ops.quantize.weights import Quantized

__all__ = ["Embedding", "LayerNorm", "Linear", "PackedLinear", "QuantizedLinear", "RMSNorm"]

_LEAST_ROWS = 2  # of a packed product: one row is multiplied otherwise


class Linear(nn.Linear):
    """nn.Linear whose weight and bias follow the input's dtype."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the result has the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class PackedLinear(nn.Module):
    """A product on the CPU whose rows do not depend on each other, bit for bit: inference only.

    The weight lies as oneDNN multiplies it fastest. One row is multiplied otherwise than several, so a second one is added. Where oneDNN
    cannot pack (float16; bfloat16 without AVX-512), is_packed is False, the weight stays as it is, and the last bits of a row may depend
    on the others. Several slices are summed in order, each rounded to the activations' dtype (config.pretraining_tp).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, num_slices: int = 1) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.bias = weight.dtype, None if bias is None else bias.detach()
        slices = [part.detach() if num_slices == 1 else part.detach().contiguous() for part in weight.chunk(num_slices, 1)]
        packed = [_packed(part) for part in slices]
        self.is_packed = all(part is not None for part in packed)
        self.slices: list[Tensor] = [part for part in packed if part is not None] if self.is_packed else slices

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [..., in_features] of the weight's dtype."""
        x_MD = input.flatten(0, -2)
        num_rows = x_MD.shape[0]
        if num_rows < _LEAST_ROWS:
            x_MD = F.pad(x_MD, (0, 0, 0, _LEAST_ROWS - num_rows))
        first, *others = self.slices
        if not others:
            y_MD = self._multiply(x_MD, first, self.bias)
        else:
            parts = x_MD.chunk(len(self.slices), -1)
            y_MD = self._multiply(parts[0], first, None)
            for part, weight in zip(parts[1:], others, strict=True):
                y_MD = y_MD + self._multiply(part, weight, None)
            y_MD = y_MD if self.bias is None else y_MD + self.bias
        return y_MD[:num_rows].view(*input.shape[:-1], -1)

    def _multiply(self, x_MD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_packed:
            return F.linear(x_MD, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x_MD, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class QuantizedLinear(nn.Module):
    """A product with a weight of small integers, which is made dense for the time of each use: inference only."""

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.quantized, self.bias = weight, bias

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the result has the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.quantized.dense(input.dtype), bias)


def _packed(weight: Tensor) -> Tensor | None:
    """Return a copy in oneDNN's layout, or None where there is none."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """Root mean square norm in float32; the result is cast back before the weight is applied, as in Llama."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalise the last axis."""
        h_TD = x_TD.float()
        h_TD = h_TD * torch.rsqrt(h_TD.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x_TD.dtype) * h_TD.to(x_TD.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weight and bias follow the input's dtype."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(input, self.normalized_shape, self.weight.to(input.dtype), self.bias.to(input.dtype), self.eps)


class Embedding(nn.Embedding):
    """nn.Embedding without its own initialisation."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""
