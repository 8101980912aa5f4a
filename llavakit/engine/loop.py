"""The generation loop: the only one in the project.

Owns: prefill of a static batch, one token per row and step, dropping rows that are done.
Everything that decides when a request ends is in request; everything about probabilities in ops/sampling.
Legend: T tokens  B rows  D model width  V vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llavakit.engine.request import Request, TokenEvent
from llavakit.errors import PromptError
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.ops.cached import CacheShape, Decode, KvCache, Prefill
from llavakit.ops.sampling import sample

__all__ = ["run_requests"]

_PREFILL_TOKENS = 8192


def run_requests(core: LlamaCore | LlavaCore, requests: Sequence[Request]) -> Iterator[TokenEvent]:
    """Answer requests together and yield an event per token, rows in order within a step; no gradients.

    A row's ids are those it gets alone. A beam search yields its best answer's events when it is over. Closing the iterator ends the
    work at once.
    """
    batch = _Batch(core, requests)
    logits_BV = batch.prefill()
    while True:
        step = batch.choose(logits_BV)
        yield from step.events
        if not step.tokens:
            return
        batch.continue_rows(step.sources)
        logits_BV = batch.decode(step.tokens)


@dataclass(frozen=True, slots=True)
class _Step:
    """What a step's logits gave: events, and the rows that go on: their tokens, and which present rows they continue."""

    events: list[TokenEvent] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


class _Batch:
    """The rows that are still running, and their cache. A beam search has several rows side by side after its first step."""

    def __init__(self, core: LlamaCore | LlavaCore, requests: Sequence[Request]) -> None:
        self.core, self.requests = core, requests
        self.rows = list(range(len(requests)))
        self.generators = [_generator(request) for request in requests]
        config, weight = core.text_config, core.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        sizes = [request.num_ids for request in requests if request.num_ids is not None]
        self.num_ids = min(sizes, default=config.vocab_size)
        capacity = max(len(request.prompt.ids) + request.max_tokens for request in requests)
        shape = CacheShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_width,
            capacity=capacity,
            window=config.window,
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
        positions_T = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        x_TD = self._embed(self.requests[first:stop])
        h_TD = self.core.forward_packed(x_TD, positions_T, Prefill(self.cache, first, lengths))
        last_B = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self.core.logits(h_TD[last_B])

    def _embed(self, requests: Sequence[Request]) -> Tensor:
        """Embed prompts end to end, with their pictures; embeddings that a caller gave are taken as they are."""
        if any(request.terms.embeds_TD is not None for request in requests):
            given = [self._embed([request]) if (x := request.terms.embeds_TD) is None else x for request in requests]
            return torch.cat([x_TD.to(self.device, self.dtype) for x_TD in given])
        prompts = [request.prompt for request in requests]
        ids_T = torch.tensor([index for prompt in prompts for index in prompt.ids], device=self.device)
        tiles = [prompt.tiles_N3SS for prompt in prompts if prompt.tiles_N3SS.shape[0]]
        if not tiles:
            return self.core.embed(ids_T)
        if not isinstance(self.core, LlavaCore):
            raise PromptError("this model is a language model without a vision tower; ask without a picture")
        grids = [grid for prompt in prompts for grid in prompt.grids]
        features_FD = self.core.encode_images(torch.cat(tiles).to(self.device), grids, dtype=self.dtype)
        return self.core.embed(ids_T, features_FD)

    @torch.no_grad()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Run one token per row and return the next logits."""
        positions_B = torch.tensor(self.cache.lengths, device=self.device)
        # An answer may spell the image token (weights decide that); here it is a token like any other.
        x_BD = self.core.get_input_embeddings()(torch.tensor(tokens, device=self.device))
        return self.core.logits(self.core.forward_packed(x_BD, positions_B, Decode(self.cache)))

    def choose(self, logits_BV: Tensor) -> _Step:
        """Choose each row's token; the greedy ones in one go."""
        logits_BV = logits_BV[:, : self.num_ids]
        greedy: list[int] = logits_BV.argmax(-1).tolist()  # waits for the device, as every step must
        step, position = _Step(), 0
        for row, group in itertools.groupby(self.rows):
            request, count = self.requests[row], len(list(group))
            if request.beams is not None:
                self._advance(step, row, position, logits_BV[position : position + count])
            elif request.has_plain_scores and request.params.temperature == 0:
                self._push(step, row, position, greedy[position])
            else:
                scores_V = request.scores(logits_BV[position]).cpu()
                self._push(step, row, position, sample(scores_V, request.params, self.generators[row]))
            position += count
        return step

    def _push(self, step: _Step, row: int, position: int, token: int) -> None:
        """Give a request its token; its row goes on unless that ended it."""
        request = self.requests[row]
        text = request.push(token)
        if request.finish_reason is None:
            step.tokens.append(token)
            step.sources.append(position)
        step.events.append(TokenEvent(row, token, text, None if request.finish_reason is None else request.completion()))

    def _advance(self, step: _Step, row: int, position: int, logits_KV: Tensor) -> None:
        """Take a beam search one step further; when it is over, its best answer is pushed."""
        request = self.requests[row]
        assert request.beams is not None
        following = request.beams.advance(logits_KV)
        if following is None:
            for token in request.beams.best()[0].ids:
                text = request.push(token)
                step.events.append(TokenEvent(row, token, text))
                if request.finish_reason is not None:
                    break
            step.events[-1] = replace(step.events[-1], completion=request.completion())
            return
        step.tokens.extend(following.tokens)
        step.sources.extend(position + parent for parent in following.parents)

    def continue_rows(self, sources: Sequence[int]) -> None:
        """Make the cache's rows those that go on, in their order."""
        if list(sources) != list(range(len(self.rows))):
            self.cache.keep(sources)
            self.rows = [self.rows[position] for position in sources]


def _generator(request: Request) -> torch.Generator:
    generator = torch.Generator()
    if request.params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.params.seed)
    return generator
