"""Beam search of one prompt: which continuations go on, which are answers, and when it is over.

Owns: BeamSearch, what the loop asks after each step of a search's rows. Refuses: the model and its cache: it says which rows to
continue with which tokens, the loop does it. Equal to transformers' beam search, whose rules these are: twice as many candidates as
beams (one more set for each further end token), of which only the first num_beams may become answers.
Legend: K rows of the search  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.types import SamplingParams

__all__ = ["BeamSearch", "Found", "NextRows"]

_NEVER = -1e9
Adjust = Callable[[Tensor, tuple[int, ...]], Tensor]
"""adjust(log_probabilities_V, answer so far) -> scores_V, the penalties of sampling."""


@dataclass(frozen=True, slots=True)
class NextRows:
    """How the search goes on: for each new row the token it appends, and which of the present rows it continues."""

    tokens: list[int]
    parents: list[int]


@dataclass(frozen=True, slots=True)
class Found:
    """An answer: its ids with the end token, and its score."""

    score: float
    ids: tuple[int, ...]


class BeamSearch:
    """The state of one search; its first step sees one row, the prompt's, all others num_beams."""

    def __init__(self, params: SamplingParams, end_ids: frozenset[int], max_tokens: int, adjust: Adjust | None) -> None:
        self.params, self.end_ids, self.max_tokens, self.adjust = params, end_ids, max_tokens, adjust
        self._running: list[tuple[int, ...]] = [()]
        self._scores_K = torch.zeros(1)
        self._found: list[Found] = []
        self._may_improve = True

    def advance(self, logits_KV: Tensor) -> NextRows | None:
        """Take the logits after the present rows' last tokens; None when the search is over."""
        scores_KV = torch.log_softmax(logits_KV.float(), -1)
        if self.adjust is not None:
            scores_KV = torch.stack([self.adjust(row_V, ids) for row_V, ids in zip(scores_KV, self._running, strict=True)])
        width, size = self.params.num_beams, logits_KV.shape[-1]
        flat = (scores_KV.cpu() + self._scores_K[:, None]).flatten()
        totals, places = flat.topk(min(max(2, 1 + len(self.end_ids)) * width, flat.numel()))
        parents, tokens = (places // size).tolist(), (places % size).tolist()
        answers = [(*self._running[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        length = len(answers[0])
        is_over = [length >= self.max_tokens or token in self.end_ids for token in tokens]
        self._take_answers(answers[:width], totals[:width], is_over[:width])
        going = (totals + torch.tensor(is_over) * _NEVER).topk(min(width, len(tokens)))
        chosen = going.indices.tolist()
        self._running, self._scores_K = [answers[index] for index in chosen], going.values
        self._may_improve = self._may_improve and self._can_improve(length)
        is_full = self.params.early_stopping is True and len(self._found) == width
        if not self._may_improve or is_full or all(is_over):
            return None
        return NextRows([tokens[index] for index in chosen], [parents[index] for index in chosen])

    def best(self) -> list[Found]:
        """Return the answers, best first: at most num_beams."""
        return self._found

    def _take_answers(self, answers: list[tuple[int, ...]], totals: Tensor, is_over: list[bool]) -> None:
        """Keep the best num_beams of the answers so far and the new ones."""
        if not self._may_improve or (self.params.early_stopping is True and len(self._found) == self.params.num_beams):
            return
        scores = (totals / len(answers[0]) ** self.params.length_penalty).tolist()
        new = [Found(score, ids) for score, ids, over in zip(scores, answers, is_over, strict=True) if over]
        self._found = sorted([*self._found, *new], key=lambda found: -found.score)[: self.params.num_beams]

    def _can_improve(self, length: int) -> bool:
        """Whether the best running row may still beat the worst answer."""
        if len(self._found) < self.params.num_beams:
            return True
        penalty = self.params.length_penalty
        reach = self.max_tokens if self.params.early_stopping == "never" and penalty > 0 else length
        return bool(float(self._scores_K[0]) / reach**penalty > self._found[-1].score)
