"""The memory of a paged cache.

Owns: PAGE, PageShape, Pages (keys and values by page), Rows (which tokens of which pages a step computes). Refuses: attention
(ops/paged on a CPU, ops/gathered elsewhere) and which page belongs to whom (engine/blocks).
Memory that was never written may hold anything, NaN too.
Legend: K key-value heads  H head width  W = H filled up to a multiple of 32  P tokens of a page
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["PAGE", "PageShape", "Pages", "Rows"]

PAGE = 32
"""Tokens of a page."""
_LANES = 32


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

    def page_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Memory of one page over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.width * PAGE * _stored(dtype, device).itemsize


class Pages:
    """Keys and values of every layer; nothing is written that nobody computes.

    On a CPU keys are [num_pages, K, W, P] and values [num_pages, K, P, W], as the kernel reads them; elsewhere (is_by_token) both are
    [num_pages, P, K, W], so that a sequence's pages end to end are its tokens end to end.
    """

    def __init__(
        self, shape: PageShape, num_pages: int, dtype: torch.dtype, device: torch.device, *, is_by_token: bool | None = None
    ) -> None:
        self.shape, self.num_pages = shape, num_pages
        self.is_by_token = device.type != "cpu" if is_by_token is None else is_by_token
        stored, heads, width = _stored(dtype, device), shape.num_kv_heads, shape.width
        sizes = ((PAGE, heads, width),) * 2 if self.is_by_token else ((heads, width, PAGE), (heads, PAGE, width))
        self.keys, self.values = (
            [torch.empty(num_pages, *size, dtype=stored, device=device) for _ in range(shape.num_layers)] for size in sizes
        )

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.keys[0].device

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages."""
        source, target = (torch.tensor(pages, device=self.device) for pages in (sources, targets))
        for memory in (*self.keys, *self.values):
            memory[target] = memory[source]


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one sequence in a step: positions first to stop - 1, and the pages of the whole sequence so far."""

    first: int
    stop: int
    table: Sequence[int]

    def slots(self) -> list[int]:
        """Return where the new tokens go: page times PAGE plus the place in it."""
        return [self.table[position // PAGE] * PAGE + position % PAGE for position in range(self.first, self.stop)]


def _stored(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which keys and values are kept: float16 has no fast arithmetic on a CPU."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype
