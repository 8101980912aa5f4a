"""Attention over a paged cache: prefill, chunks, decode and any mix of them in one call.

Owns: Pages (the cache's memory), Paged (the attention context of one step) and its three ways: the C kernel, its reference in torch,
and torch's fused attention over gathered pages, for devices other than the CPU. Refuses: which page belongs to whom (engine/blocks).
Invariant (kernel and reference): what a row gets depends on that row and its sequence alone, bit for bit: each score is summed over the
head's width in order, each page is one step of the online softmax, each output is summed over the page's keys in order.
Memory that was never written may hold anything, NaN too: what a row does not see never reaches it.
Legend: T tokens  B sequences  N heads  K key-value heads  G = N / K  H head width  W = H filled up to a multiple of 32  P tokens of a page
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.cpu.library import Attention, Kernels, load_kernels

__all__ = ["PAGE", "PageShape", "Paged", "Pages", "Rows"]

PAGE = 32
"""Tokens of a page."""
_LANES = 32
_MOST_WIDTH = 256  # of the kernel


@dataclass(frozen=True, kw_only=True, slots=True)
class PageShape:
    """What a model stores for a token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    """Positions that a token sees, itself included; None sees all before it."""

    @property
    def width(self) -> int:
        """A head's width in memory."""
        return -(-self.head_dim // _LANES) * _LANES

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Memory of one page over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.width * PAGE * _stored(dtype).itemsize


class Pages:
    """Keys [num_pages, K, W, P] and values [num_pages, K, P, W] of every layer; nothing is written that nobody computes."""

    def __init__(self, shape: PageShape, num_pages: int, dtype: torch.dtype, device: torch.device, *, use_kernels: bool = True) -> None:
        self.shape = shape
        stored, heads, width = _stored(dtype) if device.type == "cpu" else dtype, shape.num_kv_heads, shape.width
        self.keys = [torch.empty(num_pages, heads, width, PAGE, dtype=stored, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.empty(num_pages, heads, PAGE, width, dtype=stored, device=device) for _ in range(shape.num_layers)]
        is_ours = use_kernels and device.type == "cpu" and width <= _MOST_WIDTH
        self.kernels: Kernels | None = load_kernels() if is_ours else None

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages."""
        source, target = (torch.tensor(pages, device=self.keys[0].device) for pages in (sources, targets))
        for memory in (*self.keys, *self.values):
            memory[target] = memory[source]


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one sequence in a step: positions first to stop - 1, and the pages of the whole sequence so far."""

    first: int
    stop: int
    table: Sequence[int]


class Paged:
    """Attention of a step's tokens, sequence by sequence end to end, over their pages; new keys and values are stored first."""

    def __init__(self, pages: Pages, rows: Sequence[Rows]) -> None:
        device = pages.keys[0].device
        self.pages, self.rows = pages, rows
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + row.stop - row.first)
        longest = max(len(row.table) for row in rows)
        self.starts = torch.tensor(starts, dtype=torch.int32)
        self.tables = torch.tensor([[*row.table, *([0] * (longest - len(row.table)))] for row in rows], dtype=torch.int32)
        positions = [position for row in rows for position in range(row.first, row.stop)]
        self.positions_T = torch.tensor(positions, device=device)
        slots = [row.table[position // PAGE] * PAGE + position % PAGE for row in rows for position in range(row.first, row.stop)]
        self.slots_T = torch.tensor(slots, device=device)
        self._positions = torch.tensor(positions, dtype=torch.int32) if pages.kernels is not None else None

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        dtype = q_TNH.dtype
        if self.pages.kernels is not None:
            q, k, v = (x.to(keys.dtype).contiguous() for x in (q_TNH, k_TKH, v_TKH))
            self.pages.kernels.append(k, v, self.slots_T, keys, values)
            return self._attend_in_c(self.pages.kernels, q, keys, values).to(dtype)
        _append(k_TKH, v_TKH, self.slots_T, keys, values)
        if keys.device.type == "cpu":
            return self._attend_in_order(q_TNH.float(), keys, values).to(dtype)
        return self._attend_gathered(q_TNH, keys, values)

    def _attend_in_c(self, kernels: Kernels, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        assert self._positions is not None
        o_TNH = torch.empty_like(q_TNH)
        kernels.attend(
            Attention(
                q=q_TNH.data_ptr(),
                o=o_TNH.data_ptr(),
                positions=self._positions.data_ptr(),
                starts=self.starts.data_ptr(),
                tables=self.tables.data_ptr(),
                keys=keys.data_ptr(),
                values=values.data_ptr(),
                num_sequences=len(self.rows),
                table_width=self.tables.shape[1],
                num_heads=q_TNH.shape[1],
                num_kv_heads=keys.shape[1],
                head_dim=q_TNH.shape[2],
                width=keys.shape[2],
                window=0 if self.pages.shape.window is None else self.pages.shape.window,
                scale=ctypes.c_float(q_TNH.shape[2] ** -0.5),
                num_threads=torch.get_num_threads(),
            ),
            is_half=keys.dtype == torch.bfloat16,
        )
        return o_TNH

    def _attend_in_order(self, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Do what the kernel does, one torch operation at a time: no product of matrices, no sum whose order torch chooses."""
        starts = self.starts.tolist()
        outputs = [
            _attend_sequence(q_TNH[begin:end], row, keys, values, self.pages.shape.window)
            for row, begin, end in zip(self.rows, starts, starts[1:], strict=False)
        ]
        return torch.cat(outputs)

    def _attend_gathered(self, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend with torch's fused kernel over copies of the pages: sequences with one token all at once, the others one by one."""
        o_TNH = torch.empty_like(q_TNH)
        if self._singles is not None:
            o_TNH[self._singles.tokens_B] = self._singles.attend(q_TNH[self._singles.tokens_B], keys, values)
        head_dim, starts = q_TNH.shape[2], self.starts.tolist()
        for row, begin, end in zip(self.rows, starts, starts[1:], strict=False):
            if end - begin > 1:
                table = torch.tensor(row.table[: -(-row.stop // PAGE)], device=keys.device)
                k_KSH = keys[table].permute(1, 0, 3, 2).flatten(1, 2)[:, : row.stop, :head_dim]
                v_KSH = values[table].transpose(0, 1).flatten(1, 2)[:, : row.stop, :head_dim]
                seen_tS = _seen(self.positions_T[begin:end], row.stop, self.pages.shape.window)
                q_NtH = q_TNH[begin:end].transpose(0, 1)
                o_1NtH = F.scaled_dot_product_attention(q_NtH[None], k_KSH[None], v_KSH[None], attn_mask=seen_tS, enable_gqa=True)
                o_TNH[begin:end] = o_1NtH[0].transpose(0, 1)
        return o_TNH

    @functools.cached_property
    def _singles(self) -> _Singles | None:
        """The sequences that have one token in this step, where there are such."""
        device = self.positions_T.device
        places = [index for index, row in enumerate(self.rows) if row.stop - row.first == 1]
        if not places:
            return None
        num_pages = max(-(-self.rows[index].stop // PAGE) for index in places)
        tokens_B = self.starts[places].to(device, torch.int64)
        tables_BP = self.tables[places, :num_pages].to(device, torch.int64)
        seen_BS = _seen(self.positions_T[tokens_B], num_pages * PAGE, self.pages.shape.window)
        return _Singles(tokens_B, tables_BP, seen_BS)


@dataclass(frozen=True, slots=True)
class _Singles:
    """Sequences that attend with one token each, and what they see."""

    tokens_B: Tensor
    tables_BP: Tensor
    seen_BS: Tensor

    def attend(self, q_BNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend; what a sequence does not see is taken out of the copies, since it may be another's, and no number."""
        head_dim, unseen = q_BNH.shape[2], ~self.seen_BS[:, None, :, None]
        k_BKSH = keys[self.tables_BP].permute(0, 2, 1, 4, 3).flatten(2, 3)[..., :head_dim].masked_fill(unseen, 0)
        v_BKSH = values[self.tables_BP].transpose(1, 2).flatten(2, 3)[..., :head_dim].masked_fill(unseen, 0)
        mask_B11S = self.seen_BS[:, None, None]
        return F.scaled_dot_product_attention(q_BNH[:, :, None], k_BKSH, v_BKSH, attn_mask=mask_B11S, enable_gqa=True)[:, :, 0]


def _seen(positions_T: Tensor, num_places: int, window: int | None) -> Tensor:
    """Say which places each position sees: bool [T, num_places]."""
    places_S, positions_T1 = torch.arange(num_places, device=positions_T.device), positions_T[:, None]
    seen_TS = places_S <= positions_T1
    return seen_TS if window is None else seen_TS & (places_S > positions_T1 - window)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a CPU keeps keys and values: float16 has no fast arithmetic there."""
    return torch.float32 if dtype == torch.float16 else dtype


def _append(k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor, keys: Tensor, values: Tensor) -> None:
    page_T, place_T = slots_T // PAGE, slots_T % PAGE
    filled = (0, keys.shape[2] - k_TKH.shape[2])
    keys[page_T, :, :, place_T] = F.pad(k_TKH.to(keys.dtype), filled)
    values[page_T, :, place_T] = F.pad(v_TKH.to(values.dtype), filled)


def _attend_sequence(q_TNH: Tensor, row: Rows, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attend the rows of one sequence page by page in float32."""
    num_heads, head_dim = q_TNH.shape[1:]
    q_TKGH = q_TNH.unflatten(1, (keys.shape[1], -1))
    positions_T1 = torch.arange(row.first, row.stop)[:, None]
    sums_TKGW = q_TKGH.new_zeros(*q_TKGH.shape[:3], keys.shape[2])
    total_TKG1 = q_TKGH.new_zeros(*q_TKGH.shape[:3], 1)
    most_TKG1 = torch.full_like(total_TKG1, -torch.inf)
    oldest = 0 if window is None else max(0, row.first - window + 1)
    for page in range(oldest // PAGE, -(-row.stop // PAGE)):
        k_KWP, v_KPW = keys[row.table[page]].float(), values[row.table[page]].float()
        scores = q_TKGH.new_zeros(*q_TKGH.shape[:3], PAGE)
        for d in range(head_dim):
            scores += q_TKGH[..., d, None] * k_KWP[:, None, d]
        places_P = page * PAGE + torch.arange(PAGE)
        seen_TP = places_P <= positions_T1
        if window is not None:
            seen_TP &= places_P > positions_T1 - window
        seen_T11P = seen_TP[:, None, None]
        scores = (scores * head_dim**-0.5).masked_fill(~seen_T11P, -torch.inf)
        peak = torch.maximum(most_TKG1, scores.amax(-1, keepdim=True))
        base = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = (scores - base).exp()
        keep = (most_TKG1 - base).exp()
        sums_TKGW, total_TKG1, most_TKG1 = sums_TKGW * keep, total_TKG1 * keep, peak
        seen_T111 = seen_T11P[..., None]
        for place in range(min(PAGE, row.stop - page * PAGE)):
            sums_TKGW += (weights[..., place, None] * v_KPW[:, None, place]).masked_fill(~seen_T111[:, :, :, place], 0.0)
            total_TKG1 += weights[..., place, None]
    o_TKGH: Tensor = sums_TKGW[..., :head_dim] / total_TKG1
    return o_TKGH.reshape(-1, num_heads, head_dim)
