"""Choosing the next token from logits.

Owns: what changes scores (repetition, presence and frequency penalties, biases, repeated n-grams, early ends), the filters of sampling
(temperature, top-k, top-p, min-p), all in transformers' order, the draw, and the log probabilities that are reported. Pure but for the
generator's state.
Legend: V vocabulary
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from llavakit.types import SamplingParams, TokenLogprob

__all__ = ["adjust", "changes_scores", "logprobs_of", "sample", "token_probabilities"]

_LARGEST = 1e30
"""No penalty or bias takes a score beyond this, so that the arithmetic after it stays finite in float32."""

_COLD = 1e-6
"""Below this temperature, a score near _LARGEST divided by it would be infinite; above it the quotient is transformers', bit for bit."""


def changes_scores(params: SamplingParams) -> bool:
    """Whether adjust() can change anything: where not, the most likely token is that of the bare logits."""
    has_penalties = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return has_penalties or bool(params.logit_bias) or params.no_repeat_ngram_size > 0 or params.min_tokens > 0


def adjust(scores_V: Tensor, params: SamplingParams, ids: Sequence[int], num_new: int, end_ids: Collection[int]) -> Tensor:
    """Return float32 scores after penalties; ids are prompt and answer so far, num_new of them the answer's."""
    scores = scores_V.float()
    size = scores.numel()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({index for index in ids if 0 <= index < size}), device=scores.device)
        values = scores[seen]
        penalty = min(max(params.repetition_penalty, 1 / _LARGEST), _LARGEST)
        values = torch.where(values < 0, values * penalty, values / penalty)
        scores = scores.index_copy(0, seen, values)
    scores = _shifted(scores, params, ids[len(ids) - num_new :]).clamp(-_LARGEST, _LARGEST)
    banned = _repeating(ids, params.no_repeat_ngram_size)
    if num_new < params.min_tokens:
        banned |= set(end_ids)
    if banned := {index for index in banned if 0 <= index < size}:
        scores = scores.index_fill(0, torch.tensor(sorted(banned), device=scores.device), -torch.inf)
    return scores


def _shifted(scores_V: Tensor, params: SamplingParams, answer: Sequence[int]) -> Tensor:
    """Subtract presence and frequency penalties of the answer's tokens, and add the biases."""
    shifts: dict[int, float] = {}
    if params.presence_penalty != 0 or params.frequency_penalty != 0:
        for token, count in Counter(answer).items():
            shifts[token] = -params.presence_penalty - params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        shifts[token] = shifts.get(token, 0.0) + bias
    known = {token: shift for token, shift in shifts.items() if 0 <= token < scores_V.numel()}
    if not known:
        return scores_V
    index = torch.tensor(list(known), device=scores_V.device)
    return scores_V.index_add(0, index, torch.tensor(list(known.values()), dtype=scores_V.dtype, device=scores_V.device))


def _repeating(ids: Sequence[int], length: int) -> set[int]:
    """Find the tokens that would complete an n-gram of this length for the second time."""
    if length == 0 or len(ids) + 1 < length:
        return set()
    tail = tuple(ids[len(ids) - length + 1 :])
    return {ids[start + length - 1] for start in range(len(ids) - length + 1) if tuple(ids[start : start + length - 1]) == tail}


def sample(scores_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Choose one token: the most likely at temperature 0, else a draw from token_probabilities."""
    if params.temperature == 0:
        return int(scores_V.argmax())
    return int(torch.multinomial(token_probabilities(scores_V, params), 1, generator=generator))


def token_probabilities(scores_V: Tensor, params: SamplingParams) -> Tensor:
    """Return the float32 distribution after temperature, top-k, top-p and min-p."""
    scores = scores_V.float()
    if params.temperature < _COLD:  # the quotients of several scores could be infinite: make the largest 0 first
        scores = scores - scores.max()
    scores = scores / max(params.temperature, torch.finfo(torch.float32).tiny)
    if 0 < params.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.sort()
        is_cut = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        is_cut[-1] = False
        scores = scores.masked_fill(torch.zeros_like(is_cut).scatter(0, order, is_cut), -torch.inf)
    if params.min_p > 0:
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < params.min_p * shares.max(), -torch.inf)
    return scores.softmax(-1)


def logprobs_of(logits_MV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Return the log probability of one token per row, and the row's num_top likeliest tokens.

    An id that has no score, as a picture's place may have, has the log probability -inf.
    """
    logprobs_MV = torch.log_softmax(logits_MV.float(), -1)
    num_ids = logprobs_MV.shape[1]
    known = torch.tensor([token if 0 <= token < num_ids else 0 for token in tokens], device=logprobs_MV.device)
    found = logprobs_MV.gather(1, known[:, None]).squeeze(1).tolist()
    chosen = [logprob if 0 <= token < num_ids else -math.inf for token, logprob in zip(tokens, found, strict=True)]
    top = logprobs_MV.topk(min(num_top, logprobs_MV.shape[1]), -1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    likeliest = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return [TokenLogprob(token, logprob, row) for token, logprob, row in zip(tokens, chosen, likeliest, strict=True)]
