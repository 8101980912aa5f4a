"""Attention over a paged cache on a CPU: prefill, chunks, decode and any mix of them in one call.

Owns: Paged, the attention context of one step, and its two ways: the C kernel, and its reference in torch. Elsewhere ops/gathered does it.
Invariant: what a row gets depends on that row and its sequence alone, bit for bit: each score is summed over the head's width in order,
each page is one step of the online softmax, each output is summed over the page's keys in order. What a row does not see never reaches it.
Legend: T tokens  N heads  K key-value heads  G = N / K  H head width  W = H filled up to a multiple of 32  P tokens of a page
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.cpu.library import Attention, Kernels, load_kernels
from llavakit.ops.pages import PAGE, Pages, Rows

__all__ = ["Paged"]

_MOST_WIDTH = 256  # of the kernel


class Paged:
    """Attention of a step's tokens, sequence by sequence end to end, over their pages; new keys and values are stored first."""

    def __init__(self, pages: Pages, rows: Sequence[Rows], *, use_kernels: bool = True) -> None:
        self.pages, self.rows = pages, rows
        self.kernels = load_kernels() if use_kernels and pages.shape.width <= _MOST_WIDTH else None
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + row.stop - row.first)
        longest = max(len(row.table) for row in rows)
        self.starts = torch.tensor(starts, dtype=torch.int32)
        self.tables = torch.tensor([[*row.table, *([0] * (longest - len(row.table)))] for row in rows], dtype=torch.int32)
        self.positions_T = torch.tensor([position for row in rows for position in range(row.first, row.stop)])
        self.slots_T = torch.tensor([slot for row in rows for slot in row.slots()])
        self._positions_T = self.positions_T.int()
        self._given = Attention(
            slots=self.slots_T.data_ptr(),
            positions=self._positions_T.data_ptr(),
            starts=self.starts.data_ptr(),
            tables=self.tables.data_ptr(),
            num_sequences=len(rows),
            table_width=longest,
            num_kv_heads=pages.shape.num_kv_heads,
            head_dim=pages.shape.head_dim,
            width=pages.shape.width,
            window=pages.shape.window or 0,
            scale=pages.shape.head_dim**-0.5,
            num_threads=torch.get_num_threads(),
        )

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        dtype = q_TNH.dtype
        if self.kernels is not None:
            q, k, v = (x.to(keys.dtype).contiguous() for x in (q_TNH, k_TKH, v_TKH))
            return self._attend_in_c(self.kernels, q, k, v, keys, values).to(dtype)
        _append(k_TKH, v_TKH, self.slots_T, keys, values)
        starts = self.starts.tolist()
        outputs = [
            _attend_sequence(q_TNH[begin:end].float(), row, keys, values, self.pages.shape.window)
            for row, begin, end in zip(self.rows, starts, starts[1:], strict=False)
        ]
        return torch.cat(outputs).to(dtype)

    def _attend_in_c(self, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        o_TNH, given = torch.empty_like(q), self._given
        given.q, given.k, given.v, given.o = q.data_ptr(), k.data_ptr(), v.data_ptr(), o_TNH.data_ptr()
        given.keys, given.values, given.num_heads = keys.data_ptr(), values.data_ptr(), q.shape[1]
        kernels.attend(given, is_half=keys.dtype == torch.bfloat16)
        return o_TNH


def _append(k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor, keys: Tensor, values: Tensor) -> None:
    page_T, place_T = slots_T // PAGE, slots_T % PAGE
    filled = (0, keys.shape[2] - k_TKH.shape[2])
    keys[page_T, :, :, place_T] = F.pad(k_TKH.to(keys.dtype), filled)
    values[page_T, :, place_T] = F.pad(v_TKH.to(values.dtype), filled)


def _attend_sequence(q_TNH: Tensor, row: Rows, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Do for one sequence what the kernel does, page by page in float32: no product of matrices, no sum whose order torch chooses."""
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
