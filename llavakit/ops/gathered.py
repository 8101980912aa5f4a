"""Attention over a paged cache on devices other than the CPU: pages are copied together and torch's fused kernels attend to the copies.

Owns: Gathered, the attention context of one step of any mix, and Singles, that of a step of one token per sequence, which reads nothing
but tensors and so can be captured as a CUDA graph. Makes no promise about company. Copies are bounded (_GATHERED places at a time).
What a row does not see, which may be no number, never reaches it.
Legend: T tokens  B sequences of one token  N heads  K key-value heads  G = N / K  H head width  S places  P tokens of a page
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llavakit.ops.pages import PAGE, Pages, PageShape, Rows

__all__ = ["Gathered", "Singles", "gathered_bytes", "padded_table"]

_GATHERED = 1 << 14
"""Places whose keys and values are copied together."""
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN's plans for each new length anew


class Gathered:
    """Attention of a step's tokens, sequence by sequence end to end, over their pages; new keys and values are stored first."""

    def __init__(self, pages: Pages, rows: Sequence[Rows]) -> None:
        self.pages = pages
        starts = [0, *itertools.accumulate(row.stop - row.first for row in rows)]
        longer = [index for index, row in enumerate(rows) if row.stop - row.first > 1]
        single = [index for index, row in enumerate(rows) if row.stop - row.first == 1]
        num_pages = max((_num_pages(rows[index]) for index in single), default=0)
        self.positions_T, self._slots_T, tokens_B, tables, *longer_tables = _sent(
            [
                [position for row in rows for position in range(row.first, row.stop)],
                [slot for row in rows for slot in row.slots()],
                [starts[index] for index in single],
                [page for index in single for page in padded_table(rows[index], num_pages)],
                *(rows[index].table[: _num_pages(rows[index])] for index in longer),
            ],
            pages.device,
        )
        self._tokens_B = tokens_B
        self._singles = Singles(pages, self.positions_T[tokens_B], tables.view(len(single), num_pages)) if single else None
        self._longer = [
            _Longer(pages, rows[index].first, rows[index].stop, starts[index], table)
            for index, table in zip(longer, longer_tables, strict=True)
        ]

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        _append(self.pages, layer, k_TKH, v_TKH, self._slots_T)
        o_TNH = torch.empty_like(q_TNH)
        if self._singles is not None:
            o_TNH[self._tokens_B] = self._singles.attend_stored(layer, q_TNH[self._tokens_B])
        for longer in self._longer:
            o_TNH[longer.begin : longer.end] = longer.attend_stored(layer, q_TNH[longer.begin : longer.end])
        return o_TNH


class Singles:
    """Attention of one token per sequence; tables_BP hold at least the sequences' pages, then any whose values are numbers."""

    def __init__(self, pages: Pages, positions_B: Tensor, tables_BP: Tensor, slots_B: Tensor | None = None) -> None:
        """Take what the sequences see; slots_B where attend() is to store the new keys and values itself."""
        self.pages, self._tables_BP, self._slots_B = pages, tables_BP, slots_B
        self._last_B = positions_B // PAGE
        # Beyond the new token its page may hold anything.
        places_P = torch.arange(PAGE, device=positions_B.device)
        self._unwritten_BP11 = (places_P > (positions_B % PAGE)[:, None])[..., None, None]
        self._seen_BS = _seen(positions_B, tables_BP.shape[1] * PAGE, pages.shape.window)

    def attend(self, layer: int, q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        assert self._slots_B is not None
        _append(self.pages, layer, k_BKH, v_BKH, self._slots_B)
        return self.attend_stored(layer, q_BNH)

    def attend_stored(self, layer: int, q_BNH: Tensor) -> Tensor:
        """Attend to keys and values that are stored already."""
        most = max(1, _GATHERED // self._seen_BS.shape[1])
        parts = [slice(first, first + most) for first in range(0, q_BNH.shape[0], most)]
        outputs = [self._attend(layer, q_BNH[part], part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, layer: int, q_BNH: Tensor, part: slice) -> Tensor:
        head_dim = q_BNH.shape[2]
        k_BKSH, v_BKSH = (self._gather(memory[layer], part)[..., :head_dim] for memory in (self.pages.keys, self.pages.values))
        # The heads of a group ask the same keys: they stand where else a sequence's tokens would.
        q_BKGH = q_BNH.unflatten(1, (k_BKSH.shape[1], -1))
        with sdpa_kernel(_BACKENDS):
            return F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=self._seen_BS[part, None, None]).flatten(1, 2)

    def _gather(self, memory: Tensor, part: slice) -> Tensor:
        """Copy the sequences' pages together, [B, K, S, W], and clear what nobody has written."""
        copy_BPPKW = memory[self._tables_BP[part]]
        rows_B = torch.arange(copy_BPPKW.shape[0], device=memory.device)
        last = (rows_B, self._last_B[part])
        copy_BPPKW[last] = copy_BPPKW[last].masked_fill(self._unwritten_BP11[part], 0)
        return copy_BPPKW.flatten(1, 2).transpose(1, 2)


class _Longer:
    """Attention of several tokens of one sequence, the tokens begin to end - 1 of the step."""

    def __init__(self, pages: Pages, first: int, stop: int, begin: int, table: Tensor) -> None:
        self.pages, self.stop, self.begin, self.end, self._table = pages, stop, begin, begin + stop - first, table
        window = pages.shape.window
        places = torch.arange(first, stop, device=pages.device)
        self._mask = _lower_right(stop - first, stop) if window is None else _seen(places, stop, window)

    def attend_stored(self, layer: int, q_tNH: Tensor) -> Tensor:
        """Attend to keys and values that are stored already."""
        head_dim, num_heads = q_tNH.shape[2], q_tNH.shape[1]
        k_1NSH, v_1NSH = (self._gather(memory[layer], num_heads)[..., :head_dim] for memory in (self.pages.keys, self.pages.values))
        q_1NtH = q_tNH.transpose(0, 1)[None]
        with sdpa_kernel(_BACKENDS):
            return F.scaled_dot_product_attention(q_1NtH, k_1NSH, v_1NSH, attn_mask=self._mask)[0].transpose(0, 1)

    def _gather(self, memory: Tensor, num_heads: int) -> Tensor:
        """Copy the sequence's pages together, for every head that asks them: [1, N, S, W]."""
        copy_SKW = memory[self._table].flatten(0, 1)[: self.stop]
        group = num_heads // copy_SKW.shape[1]
        return (copy_SKW if group == 1 else copy_SKW.repeat_interleave(group, 1)).transpose(0, 1)[None]


def _sent(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Send lists of numbers to a device in one go: int64, one tensor each."""
    flat = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int64, pin_memory=device.type == "cuda")
    return list(flat.to(device, non_blocking=True).split([len(numbers) for numbers in lists]))


def gathered_bytes(shape: PageShape, num_heads: int, context_len: int, dtype: torch.dtype) -> int:
    """Return the most memory that copies of pages take, once in a graph and once out of one."""
    return 4 * max(_GATHERED, context_len) * num_heads * shape.width * dtype.itemsize


def padded_table(row: Rows, num_pages: int) -> list[int]:
    """Return a sequence's pages up to its last token, and its first one again and again up to num_pages."""
    own = list(row.table[: _num_pages(row)])
    return own + own[:1] * (num_pages - len(own))


def _num_pages(row: Rows) -> int:
    return -(-row.stop // PAGE)


def _append(pages: Pages, layer: int, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor) -> None:
    for memory, x in ((pages.keys[layer], k_TKH), (pages.values[layer], v_TKH)):
        x = F.pad(x, (0, pages.shape.width - pages.shape.head_dim)) if pages.shape.width != pages.shape.head_dim else x
        memory.flatten(0, 1).index_copy_(0, slots_T, x)


def _lower_right(num_queries: int, num_keys: int) -> Tensor:
    """Return torch's own mask in which the last query sees the last key, which its fused kernels need not read."""
    from torch.nn.attention.bias import causal_lower_right  # imports Dynamo, which nothing on a CPU should wait for

    return causal_lower_right(num_queries, num_keys)


def _seen(positions_T: Tensor, num_places: int, window: int | None) -> Tensor:
    """Say which places each position sees: bool [T, num_places]."""
    places_S, positions_T1 = torch.arange(num_places, device=positions_T.device), positions_T[:, None]
    seen_TS = places_S <= positions_T1
    return seen_TS if window is None else seen_TS & (places_S > positions_T1 - window)
