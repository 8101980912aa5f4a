"""Choosing the next token from logits.

Owns: the filters in transformers' order (temperature, top-k, top-p) and the draw. Pure but for the generator's state.
Legend: V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from llavakit.types import SamplingParams

__all__ = ["sample", "token_probabilities"]


def sample(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Choose one token: the most likely at temperature 0, else a draw from token_probabilities."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(token_probabilities(logits_V, params), 1, generator=generator))


def token_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Return the float32 distribution after temperature, top-k and top-p."""
    scores = logits_V.float() / params.temperature
    if 0 < params.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.sort()
        is_cut = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        is_cut[-1] = False
        scores = scores.masked_fill(torch.zeros_like(is_cut).scatter(0, order, is_cut), -torch.inf)
    return scores.softmax(-1)
