"""Causal attention inside the segments of a packed batch as one operator, with its gradient: what torch.compile takes as it is.

Owns: segmented_attention and Segmented, the attention context of compiled layers. The segments' bounds are a tensor, so neither their
number nor their lengths are part of a compiled graph. On a CPU it goes from segment to segment; on CUDA, in half precision, it is one
call of torch's flash attention. Not for float32 on CUDA, where that kernel does not exist.
Legend: T tokens  B segments  N heads  K key-value heads  G = N / K  H head width  t tokens of a segment
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Segmented", "segmented_attention"]

_WHOLE = 0  # no window: an operator's argument cannot be None and an int


class Segmented:
    """Causal attention inside each segment of a packed batch, for layers that torch.compile compiled."""

    def __init__(self, cu_seqlens: Tensor, window: int | None = None) -> None:
        """Take cu_seqlens [B+1]: the starts of the segments and, last, T; and how many positions a token sees (None: all before)."""
        self.cu_seqlens, self.window = cu_seqlens, _WHOLE if window is None else window

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:  # noqa: ARG002 - nothing is kept per layer
        """Attend segment by segment."""
        return segmented_attention(q_TNH, k_TKH, v_TKH, self.cu_seqlens, self.window)


def segmented_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, window: int = _WHOLE) -> Tensor:
    """Attend causally within each segment, over the last window positions (0: all); returns o_TNH, differentiable."""
    o_TNH: Tensor = _attend(q_TNH, k_TKH, v_TKH, cu_seqlens, window)[0]
    return o_TNH


@torch.library.custom_op("llavakit::segmented_attention", mutates_args=())
def _attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o_TNH, the log sums of the softmax, and two tensors that only the gradient's kernel knows."""
    if q_TNH.is_cuda:
        return _flash(q_TNH, k_TKH, v_TKH, cu_seqlens, window)
    o_TNH, sums_NT = torch.empty_like(q_TNH), q_TNH.new_empty(q_TNH.shape[1::-1], dtype=torch.float32)
    for part in _parts(cu_seqlens):
        q, k, v = (_in_float(x, q_TNH.shape[1]) for x in (q_TNH[part], k_TKH[part], v_TKH[part]))
        is_causal, mask = _seen(q.shape[2], window, q.device)
        o, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)
        o_TNH[part], sums_NT[:, part] = o[0].transpose(0, 1), sums[0]
    return o_TNH, sums_NT, q_TNH.new_empty(0), q_TNH.new_empty(0)


@_attend.register_fake
def _(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del k_TKH, v_TKH, cu_seqlens, window
    o_TNH, sums_NT = torch.empty_like(q_TNH), q_TNH.new_empty(q_TNH.shape[1::-1], dtype=torch.float32)
    if q_TNH.is_cuda:
        return o_TNH, sums_NT, q_TNH.new_empty(2, dtype=torch.uint64), q_TNH.new_empty((), dtype=torch.uint64)
    return o_TNH, sums_NT, q_TNH.new_empty(0), q_TNH.new_empty(0)


@torch.library.custom_op("llavakit::segmented_attention_backward", mutates_args=())
def _attend_backward(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    window: int,
    o_TNH: Tensor,
    sums_NT: Tensor,
    seed: Tensor,
    unused: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    if q_TNH.is_cuda:
        length, sides = q_TNH.shape[0], _sides(window)
        return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
            grad_TNH, q_TNH, k_TKH, v_TKH, o_TNH, sums_NT, cu_seqlens, cu_seqlens, length, length, 0.0, True, seed, unused, **sides
        )
    grads = torch.empty_like(q_TNH), torch.empty_like(k_TKH), torch.empty_like(v_TKH)
    num_heads, num_kv_heads = q_TNH.shape[1], k_TKH.shape[1]
    for part in _parts(cu_seqlens):
        grad, q, k, v, o = (_in_float(x[part], num_heads) for x in (grad_TNH, q_TNH, k_TKH, v_TKH, o_TNH))
        is_causal, mask = _seen(q.shape[2], window, q.device)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, sums_NT[None, :, part], 0.0, is_causal, attn_mask=mask
        )
        for target, x_1NtH in zip(grads, found, strict=True):
            x_tNH = x_1NtH[0].transpose(0, 1)
            target[part] = x_tNH if target is grads[0] else x_tNH.unflatten(1, (num_kv_heads, -1)).sum(2)
    return grads


@_attend_backward.register_fake
def _(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    window: int,
    o_TNH: Tensor,
    sums_NT: Tensor,
    seed: Tensor,
    unused: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    del grad_TNH, cu_seqlens, window, o_TNH, sums_NT, seed, unused
    return torch.empty_like(q_TNH), torch.empty_like(k_TKH), torch.empty_like(v_TKH)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.window = window


def _backward(ctx: Any, grad_TNH: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q_TNH, k_TKH, v_TKH, cu_seqlens, *kept = ctx.saved_tensors
    return (*_attend_backward(grad_TNH.contiguous(), q_TNH, k_TKH, v_TKH, cu_seqlens, ctx.window, *kept), None, None)


_attend.register_autograd(_backward, setup_context=_keep)


def _flash(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = q_TNH.shape[0]  # at least that of the longest segment, which the host does not know
    o_TNH, sums_NT, seed, unused, _ = torch.ops.aten._flash_attention_forward(
        q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, length, length, 0.0, True, False, **_sides(window)
    )
    return o_TNH, sums_NT, seed, unused


def _sides(window: int) -> dict[str, int | None]:
    """Say how far a token sees to the left and to the right, as the flash kernel takes it."""
    return {"window_size_left": None if window == _WHOLE else window - 1, "window_size_right": None if window == _WHOLE else 0}


def _parts(cu_seqlens: Tensor) -> Iterator[slice]:
    return (slice(start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist()))


def _in_float(x_tNH: Tensor, num_heads: int) -> Tensor:
    """Put the heads first, each key-value head as often as heads ask it, in the dtype in which a CPU is fast: [1, N, t, H]."""
    x_tNH = x_tNH.repeat_interleave(num_heads // x_tNH.shape[1], 1) if x_tNH.shape[1] != num_heads else x_tNH
    return x_tNH.float().transpose(0, 1)[None]


def _seen(length: int, window: int, device: torch.device) -> tuple[bool, Tensor | None]:
    """Say whether a plain causal mask will do, else give the mask of a window: [t, t]."""
    if window == _WHOLE or length <= window:
        return True, None
    seen_tt = torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
    return False, torch.zeros(length, length, device=device).masked_fill(~seen_tt, -torch.inf)
