"""Attention for the batch-shaped face: padding, masks and caches as transformers' eager path has them.

Owns: Dense, an attention context over B rows of S new tokens and a cache, and run_dense, which flattens [B, S] to T = B * S
and drops nothing, so that every position equals transformers', masked ones too.
Legend: B rows  S new positions  C cached + new positions  T = B * S  N heads  K key-value heads  H head width  D model width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.ops.attention import Attention
from llavakit.pretrained.outputs import Cache

__all__ = ["Dense", "DenseResult", "run_dense"]


class Dense:
    """Eager attention of every query over cache and new keys, with an additive mask of the dtype's lowest number."""

    def __init__(self, mask_BC: Tensor, num_new: int, past: Cache | None, *, window: int | None = None, record: bool = False) -> None:
        num_all = mask_BC.shape[1]
        causal_SC = torch.ones(num_new, num_all, dtype=torch.bool, device=mask_BC.device).tril(num_all - num_new)
        if window is not None:
            causal_SC = causal_SC.triu(num_all - num_new - window + 1)
        self.hidden_B1SC = ~(causal_SC & mask_BC[:, None]).unsqueeze(1)
        self.past, self.record, self.rows = past, record, (mask_BC.shape[0], num_new)
        self.present: list[tuple[Tensor, Tensor]] = []
        self.attentions: list[Tensor] = []

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attend in float32 softmax, in transformers' order of operations."""
        q_BNSH, k_BKCH, v_BKCH = (x.unflatten(0, self.rows).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        if self.past is not None:
            k_BKCH, v_BKCH = torch.cat((self.past[layer][0], k_BKCH), 2), torch.cat((self.past[layer][1], v_BKCH), 2)
        self.present.append((k_BKCH, v_BKCH))
        group = q_BNSH.shape[1] // k_BKCH.shape[1]
        k_BNCH, v_BNCH = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k_BKCH, v_BKCH))
        scores = torch.matmul(q_BNSH, k_BNCH.transpose(2, 3)) * q_BNSH.shape[-1] ** -0.5
        mask = torch.zeros_like(self.hidden_B1SC, dtype=scores.dtype).masked_fill(self.hidden_B1SC, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q_BNSH.dtype)
        if self.record:
            self.attentions.append(weights)
        return torch.matmul(weights, v_BNCH).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class DenseResult:
    """Hidden states, cache and recordings of one batch-shaped pass."""

    h_BSD: Tensor
    cache: Cache
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseInput:
    """What a batch-shaped pass is run on; None means the usual (no mask, positions counting on from the cache)."""

    x_BSD: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past: Cache | None = None
    window: int | None = None
    record_attentions: bool = False
    record_hidden: bool = False


def run_dense(forward_packed: Callable[[Tensor, Tensor, Attention, list[Tensor] | None], Tensor], given: DenseInput) -> DenseResult:
    """Run the packed core over a batch whose parts fit each other (inputs.check_batch)."""
    num_rows, num_new = given.x_BSD.shape[:2]
    device, num_past = given.x_BSD.device, 0 if given.past is None else given.past[0][0].shape[2]
    mask_BC = _mask(given.attention_mask, num_rows, num_past + num_new, device)
    positions = given.position_ids
    if positions is None:
        positions = torch.arange(num_past, num_past + num_new, device=device)
    positions_T = positions.expand(num_rows, num_new).flatten()
    attn = Dense(mask_BC, num_new, given.past, window=given.window, record=given.record_attentions)
    taps: list[Tensor] | None = [] if given.record_hidden else None
    h_TD = forward_packed(given.x_BSD.flatten(0, 1), positions_T, attn, taps)

    def batched(x_TD: Tensor) -> Tensor:
        return x_TD.reshape(num_rows, num_new, -1)

    return DenseResult(
        batched(h_TD),
        tuple(attn.present),
        None if taps is None else tuple(map(batched, taps)),
        tuple(attn.attentions) if given.record_attentions else None,
    )


def _mask(mask: Tensor | None, num_rows: int, num_all: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(num_rows, num_all, dtype=torch.bool, device=device)
    return mask.to(device).bool()
