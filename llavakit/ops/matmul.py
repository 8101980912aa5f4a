"""Products with weights that lie as a CPU multiplies them fastest, in a way in which rows do not depend on each other, bit for bit.

Owns: PackedWeight and its ways: our kernel (float32, bfloat16), where there is no compiler oneDNN's, and where that cannot pack (float16;
bfloat16 without AVX-512) torch's own, which makes no promise about bits.
Legend: M rows  I inputs  O outputs
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.cpu.library import load_kernels

__all__ = ["PackedWeight"]

_PANEL = 64  # outputs of a panel, as the C file has them
_LEAST_ROWS = 2  # of oneDNN's product: one row is multiplied otherwise


class PackedWeight:
    """A weight [O, I] and its bias, ready to multiply rows of its dtype."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, use_kernels: bool = True) -> None:
        self.num_outputs, self.num_inputs = weight_OI.shape
        self.bias = None if bias_O is None else bias_O.detach().contiguous()
        weight_OI = weight_OI.detach()
        is_known = weight_OI.dtype in (torch.float32, torch.bfloat16) and weight_OI.device.type == "cpu"
        self._kernels = load_kernels() if is_known and use_kernels else None
        packed = _onednn(weight_OI) if is_known and self._kernels is None else None
        self.is_steady = self._kernels is not None or packed is not None
        """Whether a row's bits depend on nothing but the row."""
        self._weight = _panels(weight_OI) if self._kernels is not None else weight_OI.contiguous() if packed is None else packed

    def multiply(self, x_MI: Tensor) -> Tensor:
        """Return x w^T + bias: [M, O]."""
        if self._kernels is not None:
            if self.num_inputs % 2 and x_MI.dtype == torch.bfloat16:
                x_MI = F.pad(x_MI, (0, 1))
            return self._kernels.matmul(x_MI, self._weight, self.bias, self.num_outputs)
        if not self.is_steady:
            return F.linear(x_MI, self._weight, self.bias)
        num_rows = x_MI.shape[0]
        if num_rows < _LEAST_ROWS:
            x_MI = F.pad(x_MI, (0, 0, 0, _LEAST_ROWS - num_rows))
        y_MO: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, self._weight, self.bias, "none", [], "")
        return y_MO[:num_rows]


def _panels(weight_OI: Tensor) -> Tensor:
    """Return the weight as the kernel reads it: [P, I, 64], or in bfloat16 [P, I / 2, 64, 2]; what is missing is zero."""
    step = 2 if weight_OI.dtype == torch.bfloat16 else 1
    num_outputs, num_inputs = weight_OI.shape
    filled = F.pad(weight_OI, (0, -num_inputs % step, 0, -num_outputs % _PANEL))
    return filled.view(-1, _PANEL, filled.shape[1] // step, step).transpose(1, 2).contiguous()


def _onednn(weight_OI: Tensor) -> Tensor | None:
    """Return a copy in oneDNN's layout, or None where there is none."""
    if not torch.backends.mkldnn.is_available():
        return None
    if weight_OI.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)  # type: ignore[no-any-return]
