"""Attention over a cache of contiguous rows: prefill of ragged prompts, then one token per row.

Owns: KvCache and the two contexts over it. Invariant: a row's keys and values depend on that row alone.
Grouped heads need no copies in decode: the G queries of a key-value head are G queries over the same keys.
Legend: T tokens  B rows  N heads  K key-value heads  G = N / K  H head width  C capacity
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.attention import causal_attention, causal_rows

__all__ = ["CacheShape", "Decode", "KvCache", "Prefill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """Size of a cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    window: int | None = None
    """Positions that a token sees, itself included; None sees all before it."""


class KvCache:
    """Keys and values [B, K, C, H] per layer, and how many positions of each row are filled."""

    def __init__(self, shape: CacheShape, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (num_rows, shape.num_kv_heads, shape.capacity, shape.head_dim)
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        self.lengths = [0] * num_rows
        self.window = shape.window

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        index = torch.tensor(rows, device=self.keys[0].device)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]


class Prefill:
    """Causal attention of whole prompts, packed end to end, that fills rows first_row and following of an empty cache."""

    def __init__(self, cache: KvCache, first_row: int, lengths: Sequence[int]) -> None:
        self.cache, self.first_row, self.lengths = cache, first_row, list(lengths)
        cache.lengths[first_row : first_row + len(lengths)] = lengths

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Store keys and values and attend: prompts of one length together, others one by one."""
        if min(self.lengths) == max(self.lengths):
            return self._attend_even(layer, q_TNH, k_TKH, v_TKH)
        outputs = []
        segments = zip(q_TNH.split(self.lengths), k_TKH.split(self.lengths), v_TKH.split(self.lengths), strict=True)
        for row, (q, k, v) in enumerate(segments, self.first_row):
            self.cache.keys[layer][row, :, : k.shape[0]] = k.transpose(0, 1)
            self.cache.values[layer][row, :, : v.shape[0]] = v.transpose(0, 1)
            outputs.append(causal_attention(q, k, v, window=self.cache.window))
        return torch.cat(outputs)

    def _attend_even(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        num_rows, length = len(self.lengths), self.lengths[0]
        q_BNSH, k_BKSH, v_BKSH = (x.unflatten(0, (num_rows, length)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        rows = slice(self.first_row, self.first_row + num_rows)
        self.cache.keys[layer][rows, :, :length] = k_BKSH
        self.cache.values[layer][rows, :, :length] = v_BKSH
        return causal_rows(q_BNSH, k_BKSH, v_BKSH, window=self.cache.window).transpose(1, 2).flatten(0, 1)


class Decode:
    """Attention of one new token per row over everything its row holds."""

    def __init__(self, cache: KvCache) -> None:
        device = cache.keys[0].device
        self.cache = cache
        self.slots_B = torch.tensor(cache.lengths, device=device)
        cache.lengths = [length + 1 for length in cache.lengths]
        self.longest = max(cache.lengths)
        # Rows of one length within the window need no mask, and attention without one is faster.
        is_windowed = cache.window is not None and self.longest > cache.window
        needs_mask = min(cache.lengths) != self.longest or is_windowed
        steps_C = torch.arange(self.longest, device=device)
        seen_BC = steps_C <= self.slots_B[:, None]
        if cache.window is not None:
            seen_BC &= steps_C > self.slots_B[:, None] - cache.window
        self.mask_B11C = seen_BC[:, None, None] if needs_mask else None
        self.rows_B = torch.arange(len(cache.lengths), device=device)

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Store the new keys and values, then attend; here T = B."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows_B, :, self.slots_B] = k_TKH
        values[self.rows_B, :, self.slots_B] = v_TKH
        q_BKGH = q_TNH.unflatten(1, (k_TKH.shape[1], -1))
        o_BKGH = F.scaled_dot_product_attention(q_BKGH, keys[:, :, : self.longest], values[:, :, : self.longest], attn_mask=self.mask_B11C)
        return o_BKGH.flatten(1, 2)
