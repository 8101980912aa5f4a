"""Cross entropy of a linear head without holding all logits.

Owns: the chunk loop. Invariants: logits exist for one chunk of rows at a time, in float32; the sum does not depend on the
chunk size beyond rounding; gradients are computed in the forward pass, so nothing of size rows x vocabulary is kept.
Legend: M supervised rows  D model width  V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IGNORE", "linear_cross_entropy"]

IGNORE = -100
"""The label of a position that carries no loss."""
_CHUNK_ROWS = 1024


def linear_cross_entropy(h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, *, chunk_rows: int = _CHUNK_ROWS) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy of labels under softmax(h @ weight.T).

    Returns the float32 sum (differentiable in h and weight) and the number of rows whose most likely token is the label.
    The product runs in h's dtype (the weight is cast to it), the softmax in float32. No label may be IGNORE.
    """
    loss, num_right = _LinearCrossEntropy.apply(h_MD, weight_VD, labels_M, chunk_rows)  # type: ignore[no-untyped-call]
    return loss, num_right


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk_rows: int) -> tuple[Tensor, Tensor]:
        needs_h, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        cast_VD = weight_VD.to(h_MD.dtype)
        total = h_MD.new_zeros((), dtype=torch.float32)
        num_right = torch.zeros((), dtype=torch.int64, device=h_MD.device)
        grad_h = torch.empty_like(h_MD) if needs_h else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for start in range(0, h_MD.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            h_CD, labels_C1 = h_MD[rows], labels_M[rows, None]
            log_p_CV = F.log_softmax((h_CD @ cast_VD.t()).float(), -1)
            total -= log_p_CV.gather(1, labels_C1).sum()
            num_right += (log_p_CV.argmax(-1, keepdim=True) == labels_C1).sum()
            if grad_h is None and grad_weight is None:
                continue
            grad_CV = log_p_CV.exp_().scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1.0, dtype=torch.float32)).to(h_MD.dtype)
            if grad_h is not None:
                grad_h[rows] = grad_CV @ cast_VD
            if grad_weight is not None:
                grad_weight += (grad_CV.t() @ h_CD).float()
        ctx.save_for_backward(grad_h, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(num_right)
        return total, num_right

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_h, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_h is None else grad_h * scale.to(grad_h.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
            None,
        )
