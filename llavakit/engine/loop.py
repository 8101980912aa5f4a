"""The generation loop: the only one in the project.

Owns: prefill of a static batch, one token per row and step, dropping rows that are done.
Everything that decides when a request ends is in request; everything about probabilities in ops/sampling.
Legend: T tokens  B rows  D model width  V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llavakit.engine.request import Request, TokenEvent
from llavakit.errors import PromptError
from llavakit.geometry import ImageGrid
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.ops.cached import CacheShape, Decode, KvCache, Prefill
from llavakit.ops.sampling import sample

__all__ = ["run_requests"]

_PREFILL_TOKENS = 8192


def run_requests(core: LlamaCore | LlavaCore, requests: Sequence[Request]) -> Iterator[TokenEvent]:
    """Answer requests together and yield an event per token, rows in order within a step; no gradients.

    A row's ids are those it gets alone. Closing the iterator ends the work at once.
    """
    batch = _Batch(core, requests)
    logits_BV = batch.prefill()
    while True:
        tokens = batch.choose(logits_BV)
        for row, token in zip(batch.rows, tokens, strict=True):
            request = requests[row]
            text = request.push(token)
            yield TokenEvent(row, token, text, None if request.finish_reason is None else request.completion())
        tokens = batch.drop_finished(tokens)
        if not tokens:
            return
        logits_BV = batch.decode(tokens)


class _Batch:
    """The rows that are still running, and their cache."""

    def __init__(self, core: LlamaCore | LlavaCore, requests: Sequence[Request]) -> None:
        self.core, self.requests = core, requests
        self.rows = list(range(len(requests)))
        self.generators = [_generator(request) for request in requests]
        config, weight = core.text_config, core.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        capacity = max(len(request.prompt.ids) + request.max_tokens for request in requests)
        shape = CacheShape(
            num_layers=config.num_hidden_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_width, capacity=capacity
        )
        self.cache = KvCache(shape, len(requests), self.dtype, self.device)

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Run all prompts, several at a time, and return the logits after each one's last token."""
        chunks, first = [], 0
        while first < len(self.requests):
            stop, num_tokens = first, 0
            while stop < len(self.requests) and (stop == first or num_tokens + len(self.requests[stop].prompt.ids) <= _PREFILL_TOKENS):
                num_tokens += len(self.requests[stop].prompt.ids)
                stop += 1
            chunks.append(self._prefill_chunk(first, stop))
            first = stop
        return torch.cat(chunks)

    def _prefill_chunk(self, first: int, stop: int) -> Tensor:
        prompts = [request.prompt for request in self.requests[first:stop]]
        lengths = [len(prompt.ids) for prompt in prompts]
        ids_T = torch.tensor([index for prompt in prompts for index in prompt.ids], device=self.device)
        positions_T = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        tiles = [prompt.tiles_N3SS for prompt in prompts if prompt.tiles_N3SS.shape[0]]
        grids = [grid for prompt in prompts for grid in prompt.grids]
        x_TD = self._embed(ids_T, torch.cat(tiles) if tiles else None, grids)
        h_TD = self.core.forward_packed(x_TD, positions_T, Prefill(self.cache, first, lengths))
        last_B = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self.core.logits(h_TD[last_B])

    def _embed(self, ids_T: Tensor, tiles_N3SS: Tensor | None, grids: Sequence[ImageGrid]) -> Tensor:
        if tiles_N3SS is None:
            return self.core.embed(ids_T)
        if not isinstance(self.core, LlavaCore):
            raise PromptError("this model is a language model without a vision tower; ask without a picture")
        return self.core.embed(ids_T, self.core.encode_images(tiles_N3SS.to(self.device), grids, dtype=self.dtype))

    @torch.no_grad()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Run one token per row and return the next logits."""
        positions_B = torch.tensor(self.cache.lengths, device=self.device)
        # An answer may spell the image token (weights decide that); here it is a token like any other.
        x_BD = self.core.get_input_embeddings()(torch.tensor(tokens, device=self.device))
        return self.core.logits(self.core.forward_packed(x_BD, positions_B, Decode(self.cache)))

    def choose(self, logits_BV: Tensor) -> list[int]:
        """Choose each row's token; the greedy ones in one go."""
        tokens: list[int] = logits_BV.argmax(-1).tolist()  # waits for the device, as every step must
        for position, row in enumerate(self.rows):
            if self.requests[row].params.temperature > 0:
                tokens[position] = sample(logits_BV[position].cpu(), self.requests[row].params, self.generators[row])
        return tokens

    def drop_finished(self, tokens: Sequence[int]) -> list[int]:
        """Keep only the rows that go on; returns their tokens."""
        going = [position for position, row in enumerate(self.rows) if self.requests[row].finish_reason is None]
        if going and len(going) < len(self.rows):
            self.cache.keep(going)
        self.rows = [self.rows[position] for position in going]
        return [tokens[position] for position in going]


def _generator(request: Request) -> torch.Generator:
    generator = torch.Generator()
    if request.params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.params.seed)
    return generator
