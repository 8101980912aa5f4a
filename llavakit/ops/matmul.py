"""Products with weights that lie as a CPU multiplies them fastest, in a way in which rows do not depend on each other, bit for bit.

Owns: PackedWeight and its ways: our kernel (float32, bfloat16), where there is no compiler oneDNN's, and where that cannot pack (float16;
bfloat16 without AVX-512) torch's own, which makes no promise about bits.
Legend: M rows  I inputs  O outputs
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.cpu.library import Weight, load_kernels

__all__ = ["PackedWeight"]

_PANEL = 64  # outputs of a panel, as the C file has them
_LARGE_PAGE = 2 << 20
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
        self._step = 1 if self._kernels is None or weight_OI.dtype == torch.float32 else self._kernels.half_inputs
        if self._kernels is not None:
            self._weight = _panels(weight_OI, self._step)
        else:
            self._weight = weight_OI.contiguous() if packed is None else packed

    def pointers(self) -> Weight:
        """Return what the kernels take of it in other calls, with num_filled inputs a row."""
        assert self._kernels is not None, "the weight lies as the kernels read it"
        bias = None if self.bias is None else self.bias.data_ptr()
        return Weight(self._weight.data_ptr(), bias, self.num_outputs, self._weight.shape[1])

    @property
    def num_filled(self) -> int:
        """Inputs of a row for the kernels, filled up with zeros."""
        return self.num_inputs + -self.num_inputs % self._step

    def multiply(self, x_MI: Tensor) -> Tensor:
        """Return x w^T + bias: [M, O]."""
        if self._kernels is not None:
            if self.num_filled > self.num_inputs:
                x_MI = F.pad(x_MI, (0, self.num_filled - self.num_inputs))
            return self._kernels.matmul(x_MI, self._weight, self.bias, self.num_outputs)
        if not self.is_steady:
            return F.linear(x_MI, self._weight, self.bias)
        num_rows = x_MI.shape[0]
        if num_rows < _LEAST_ROWS:
            x_MI = F.pad(x_MI, (0, 0, 0, _LEAST_ROWS - num_rows))
        y_MO: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, self._weight, self.bias, "none", [], "")
        return y_MO[:num_rows]


def _panels(weight_OI: Tensor, step: int) -> Tensor:
    """Return the weight as the kernel reads it: [P, I, 64], or in bfloat16 [P, I / 2, 64, 2]; what is missing to a step is zero."""
    together = 2 if weight_OI.dtype == torch.bfloat16 else 1
    missing = (0, -weight_OI.shape[1] % step, 0, -weight_OI.shape[0] % _PANEL)
    filled = F.pad(weight_OI, missing) if any(missing) else weight_OI.contiguous()
    panels = filled.view(-1, _PANEL, filled.shape[1] // together, together).transpose(1, 2)
    return _memory(panels.numel() * panels.itemsize).view(panels.dtype).view(panels.shape).copy_(panels)


def _memory(num_bytes: int) -> Tensor:
    """Return bytes, on the system's larger pages where it has some: whole weights are read with every token."""
    if num_bytes < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _onednn(weight_OI: Tensor) -> Tensor | None:
    """Return a copy in oneDNN's layout, or None where there is none."""
    if not torch.backends.mkldnn.is_available():
        return None
    if weight_OI.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)  # type: ignore[no-any-return]
