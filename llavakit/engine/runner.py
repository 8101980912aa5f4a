"""From planned work to logits: the only place of the engine that touches the model and the cache's memory.

Owns: Runner, and how much memory a step takes. Refuses: planning (scheduler), choosing tokens (request).
One call of the model per step, whatever its mix.
Legend: T tokens of a step  M rows whose logits are wanted  D model width  V vocabulary  F image features
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.engine.graphs import DecodeGraphs, recorder
from llavakit.engine.pictures import Picture
from llavakit.engine.scheduler import Work
from llavakit.model.llava import TOWER_BATCH, LlamaCore, LlavaCore
from llavakit.model.lora import Adapting, Lora
from llavakit.ops.attention import Packed
from llavakit.ops.gathered import Gathered, gathered_bytes
from llavakit.ops.paged import Paged
from llavakit.ops.pages import Pages, PageShape, Rows

__all__ = ["Runner", "StepInput", "measure_workspace", "page_shape"]

_LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class StepInput:
    """One piece of work, and what its tokens are where ids do not say it."""

    work: Work
    features: Mapping[str, Tensor]
    """Of the pictures that its positions overlap, by digest."""
    embeds_TD: Tensor | None
    """Of the whole prompt, where a caller gave them."""
    lora: Lora | None
    """The adapter that its tokens go through."""


class Runner:
    """The model and the pages it computes on."""

    def __init__(self, core: LlamaCore | LlavaCore, num_pages: int) -> None:
        self.core = core
        weight = core.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        has_graphs = self.device.type == "cuda"
        self.pages = Pages(page_shape(core), num_pages + has_graphs, self.dtype, self.device)
        self.graphs = DecodeGraphs(core, self.pages, num_pages, recorder()) if has_graphs else None
        self.adapting: Adapting | None = None
        """Set once the model has place for adapters."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to)."""
        if pairs:
            self.pages.copy([source for source, _ in pairs], [target for _, target in pairs])

    def run(self, inputs: Sequence[StepInput]) -> Tensor:
        """Compute the works' tokens, end to end: h_TD after the last layer; their keys and values are in the cache afterwards.

        The result lasts until the next step.
        """
        rows = [Rows(given.work.first, given.work.stop, given.work.row.blocks) for given in inputs]
        if self.graphs is not None and all(map(_is_plain_token, inputs)):
            h_BD = self.graphs.run([given.work.row.ids[given.work.first] for given in inputs], rows)
            if h_BD is not None:
                return h_BD
        attn = Gathered(self.pages, rows) if self.pages.is_by_token else Paged(self.pages, rows)
        with self.adapting.using(self._active(inputs)) if self.adapting is not None else contextlib.nullcontext():
            return self.core.forward_packed(self._embed(inputs), attn.positions_T, attn)

    def encode(self, picture: Picture, lora: Lora | None) -> Tensor:
        """Encode one picture: features_FD. Raises: InputError for pixels that cannot be used."""
        assert isinstance(self.core, LlavaCore)
        with self.adapting.using([(None, lora)]) if self.adapting is not None and lora is not None else contextlib.nullcontext():
            return self.core.encode_images(picture.tiles_N3SS.to(self.device), [picture.grid], dtype=self.dtype)

    def logits(self, h_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """Score the vocabulary after chosen tokens of a step: z_MV."""
        chosen = torch.tensor(rows, device=h_TD.device)
        if len(rows) <= _LOGIT_ROWS:
            return self.core.logits(h_TD[chosen])
        return torch.cat([self.core.logits(h_TD[part]) for part in chosen.split(_LOGIT_ROWS)])

    def _active(self, inputs: Sequence[StepInput]) -> list[tuple[Tensor | None, Lora]]:
        """Say which of a step's tokens go through which adapters."""
        rows: dict[Lora, list[int]] = {}
        offset = 0
        for given in inputs:
            count = given.work.stop - given.work.first
            if given.lora is not None:
                rows.setdefault(given.lora, []).extend(range(offset, offset + count))
            offset += count
        return [(torch.tensor(own, device=self.device), lora) for lora, own in rows.items()]

    def _embed(self, inputs: Sequence[StepInput]) -> Tensor:
        """Look up the tokens, and put in their places what is no token: a picture's features, a caller's embeddings."""
        ids: list[int] = []
        places: list[int] = []
        parts: list[Tensor] = []
        for given in inputs:
            job, row, first, stop = given.work
            begin = len(ids) - first
            own = [*row.ids[first:stop], *row.draft] if stop > len(row.ids) else row.ids[first:stop]
            ids += own[: stop - first]
            for span in job.spans:
                start, end = max(span.start, first), min(span.stop, stop)
                if start < end:
                    ids[begin + start : begin + end] = [0] * (end - start)
                    places += range(begin + start, begin + end)
                    offset = span.offset - span.start
                    parts.append(given.features[span.digest][start + offset : end + offset])
            if given.embeds_TD is not None and first < (end := min(stop, given.embeds_TD.shape[0])):
                places += range(begin + first, begin + end)
                parts.append(given.embeds_TD[first:end].to(self.device))
        x_TD: Tensor = self.core.get_input_embeddings()(torch.tensor(ids, device=self.device))
        if places:
            x_TD = x_TD.index_put((torch.tensor(places, device=self.device),), torch.cat(parts).to(x_TD.dtype))
        return x_TD


@torch.inference_mode()
def measure_workspace(core: LlamaCore | LlavaCore, step_tokens: int) -> int:
    """Run the largest step and the most tiles on a GPU once, and return the bytes that they take beside weights and cache."""
    weight = core.get_input_embeddings().weight
    device = weight.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    x_TD = core.get_input_embeddings()(torch.zeros(step_tokens, dtype=torch.int64, device=device))
    h_TD = core.forward_packed(x_TD, torch.arange(step_tokens, device=device), Packed(torch.tensor([0, step_tokens])))
    core.logits(h_TD[:_LOGIT_ROWS]).float()
    if isinstance(core, LlavaCore):
        side = core.config.vision_config.image_size
        core.encode_images(torch.zeros(TOWER_BATCH, 3, side, side, device=device), dtype=weight.dtype)
    peak = torch.cuda.max_memory_allocated(device) - before
    del x_TD, h_TD
    torch.cuda.empty_cache()
    return peak + gathered_bytes(page_shape(core), core.text_config.num_attention_heads, core.text_config.context_len, weight.dtype)


def _is_plain_token(given: StepInput) -> bool:
    """Whether a work is one token, told by its id, that goes through the model as it is."""
    work = given.work
    is_told = given.embeds_TD is None or work.first >= given.embeds_TD.shape[0]
    is_id = work.first < len(work.row.ids) and not any(span.start <= work.first < span.stop for span in work.job.spans)
    return work.stop - work.first == 1 and is_told and is_id and given.lora is None


def page_shape(core: LlamaCore | LlavaCore) -> PageShape:
    """Say what a model stores for a token."""
    config = core.text_config
    return PageShape(
        num_layers=config.num_hidden_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_width, window=config.window
    )
