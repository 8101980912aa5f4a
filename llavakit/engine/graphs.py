"""Steps in which every sequence has one token, captured as CUDA graphs: a step costs what its arithmetic does, not what launching it does.

Owns: DecodeGraphs and recorder. A graph is made for a number of sequences and of pages; a step takes the next larger one, filled up with
sequences that write into a page of nobody. What a graph computes is what the model computes without it. Where a graph cannot be captured
none is used from then on.
Legend: B sequences  P pages of a table  D model width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llavakit.logs import logger
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.ops.gathered import Singles, padded_table
from llavakit.ops.pages import PAGE, Pages, Rows

__all__ = ["DecodeGraphs", "recorder"]

_LOG = logger("engine")


Compute = Callable[[], Tensor]


class DecodeGraphs:
    """The graphs of one model and its pages."""

    def __init__(self, core: LlamaCore | LlavaCore, pages: Pages, spare: int, record: Callable[[Compute], Compute]) -> None:
        """Take the page that belongs to no sequence, and what turns a computation into its recording (see recorder)."""
        self.core, self.pages, self.spare, self.record = core, pages, spare, record
        self.num_replays = 0
        self._is_on = True
        self._seen: set[tuple[int, int]] = set()
        self._steps: dict[tuple[int, int], tuple[_Step, Compute]] = {}

    def run(self, ids: Sequence[int], rows: Sequence[Rows]) -> Tensor | None:
        """Compute one token of each sequence: h_BD, which lasts until the next run; None where there is no graph for it (yet).

        A size that comes up for the first time runs without a graph, which readies what capturing needs.
        """
        size = (_rounded(len(rows)), _rounded(max(len(row.table) for row in rows)))
        if not self._is_on:
            return None
        if size not in self._seen:
            self._seen.add(size)
            return None
        if size not in self._steps:
            step = _Step(self.core, self.pages, self.spare, *size)
            step.fill(ids, rows)  # numbers that can be computed with
            try:
                self._steps[size] = (step, self.record(step.compute))
            except RuntimeError as error:
                _LOG.warning("decode steps run without CUDA graphs, which is slower: %s", error)
                self._is_on = False
                self._steps.clear()
                return None
        step, replay = self._steps[size]
        step.fill(ids, rows)
        self.num_replays += 1
        return replay()[: len(rows)]


def recorder() -> Callable[[Compute], Compute]:
    """Return what captures computations as CUDA graphs, all in the same memory: each overwrites what the one before returned."""
    memory = torch.cuda.graph_pool_handle()

    def record(compute: Compute) -> Compute:
        graph = torch.cuda.CUDAGraph()
        # Other threads prepare requests in the meantime, which must not end the capture.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return record


class _Step:
    """One size of step, and the numbers that tell what is computed."""

    def __init__(self, core: LlamaCore | LlavaCore, pages: Pages, spare: int, num_rows: int, num_pages: int) -> None:
        self._core, self._pages, self._spare = core, pages, spare
        self._sizes = (num_rows, num_rows, num_rows, num_rows * num_pages)
        device = pages.device
        self._numbers = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._staged = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=device.type == "cuda")

    def fill(self, ids: Sequence[int], rows: Sequence[Rows]) -> None:
        """Say which tokens of which sequences come next; the step before must be over."""
        num_rows = self._sizes[0]
        num_pages, missing = self._sizes[3] // num_rows, num_rows - len(rows)
        numbers = [
            *ids,
            *[0] * missing,
            *(row.first for row in rows),
            *[0] * missing,
            *(row.table[row.first // PAGE] * PAGE + row.first % PAGE for row in rows),
            *[self._spare * PAGE] * missing,
        ]
        for row in rows:
            numbers += padded_table(row, num_pages)
        numbers += [self._spare] * (missing * num_pages)
        self._staged.copy_(torch.tensor(numbers))
        self._numbers.copy_(self._staged, non_blocking=True)

    def compute(self) -> Tensor:
        """Compute the step from the numbers alone: h_BD."""
        ids_B, positions_B, slots_B, tables = self._numbers.split(self._sizes)
        attn = Singles(self._pages, positions_B, tables.view(self._sizes[0], -1), slots_B)
        return self._core.forward_packed(self._core.get_input_embeddings()(ids_B), positions_B, attn)


def _rounded(count: int) -> int:
    """Return the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
