"""Cross entropy of a linear head, and log probabilities of single labels, without holding all logits.

Owns: the chunk loops. Invariants: logits exist for one chunk of rows at a time, in float32; results do not depend on the
chunk size beyond rounding; nothing of size rows x vocabulary is kept: the cross entropy's gradients are computed in the forward pass,
those of log probabilities from logits that are computed again.
Legend: M supervised rows  D model width  V vocabulary  C rows of a chunk  A groups of rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IGNORE", "linear_cross_entropy", "linear_logprobs", "sums_by_length"]

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


def linear_logprobs(h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, *, chunk_rows: int = _CHUNK_ROWS) -> Tensor:
    """Return the float32 log probability of each label under softmax(h @ weight.T), differentiable in h and weight.

    Dtypes as in linear_cross_entropy. The gradient of each row is known only in the backward pass, which computes the logits again.
    """
    logprobs_M: Tensor = _LinearLogprobs.apply(h_MD, weight_VD, labels_M, chunk_rows)  # type: ignore[no-untyped-call]
    return logprobs_M


def sums_by_length(values_M: Tensor, lengths_A: Tensor) -> Tensor:
    """Sum the first lengths[0] values, the next lengths[1] of them, and so on: sums_A, in one order on any device.

    The lengths must add up to M; nothing waits for the device.
    """
    groups_A1 = torch.arange(lengths_A.shape[0], device=values_M.device)[:, None]
    owner_M = groups_A1.squeeze(1).repeat_interleave(lengths_A, output_size=values_M.shape[0])
    return torch.where(owner_M == groups_A1, values_M, 0.0).sum(1)


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


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk_rows: int) -> Tensor:
        cast_VD = weight_VD.to(h_MD.dtype)
        logprobs_M = torch.empty(h_MD.shape[0], dtype=torch.float32, device=h_MD.device)
        for start in range(0, h_MD.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            log_p_CV = F.log_softmax((h_MD[rows] @ cast_VD.t()).float(), -1)
            logprobs_M[rows] = log_p_CV.gather(1, labels_M[rows, None]).squeeze(1)
        ctx.save_for_backward(h_MD, weight_VD, labels_M)
        ctx.chunk_rows = chunk_rows
        return logprobs_M

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        h_MD, weight_VD, labels_M = ctx.saved_tensors
        needs_h, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        cast_VD = weight_VD.to(h_MD.dtype)
        grad_h = torch.empty_like(h_MD) if needs_h else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for start in range(0, h_MD.shape[0], ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            h_CD, scale_C1 = h_MD[rows], grads[0][rows, None]
            p_CV = F.softmax((h_CD @ cast_VD.t()).float(), -1)
            grad_CV = p_CV.mul_(-scale_C1).scatter_add_(1, labels_M[rows, None], scale_C1).to(h_MD.dtype)
            if grad_h is not None:
                grad_h[rows] = grad_CV @ cast_VD
            if grad_weight is not None:
                grad_weight += (grad_CV.t() @ h_CD).float()
        return grad_h, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None
