"""Sampling: the filters against transformers', the draw against its distribution."""

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llavakit.ops.sampling import adjust, logprobs_of, sample, token_probabilities
from llavakit.types import SamplingParams


def logits(seed: int) -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 10, 0.5), (1.0, 0, 0.01)])
def test_probabilities_equal_transformers(temperature: float, top_k: int, top_p: float) -> None:
    for seed in range(10):
        scores = logits(seed)[None]
        expected = TemperatureLogitsWarper(temperature)(None, scores)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        found = token_probabilities(logits(seed), SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
        assert found.equal(expected.softmax(-1)[0])


def test_greedy_takes_the_most_likely() -> None:
    assert sample(torch.tensor([0.0, 3.0, 1.0]), SamplingParams(), torch.Generator()) == 1


def test_draws_follow_the_distribution() -> None:
    params, generator = SamplingParams(temperature=1.0), torch.Generator().manual_seed(0)
    scores = torch.tensor([0.0, 1.0, 2.0])
    draws = torch.tensor([sample(scores, params, generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=3) / 4000
    assert torch.allclose(shares, scores.softmax(-1), atol=0.03)  # four standard deviations


def test_a_seed_fixes_the_draws() -> None:
    params = SamplingParams(temperature=1.0)
    rows = [[sample(logits(1), params, generator) for _ in range(20)] for generator in (torch.Generator().manual_seed(5) for _ in range(2))]
    assert rows[0] == rows[1]


def test_an_id_without_a_score_has_no_probability() -> None:
    found = logprobs_of(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), [-200, 0], 1)
    assert found[0].logprob == -math.inf
    assert [(token, round(logprob, 4)) for token, logprob in found[0].top] == [(1, -0.3133)]
    assert found[1].logprob == pytest.approx(-0.1269, abs=1e-4)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 1e-7, 1e-5, 100.0])
@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-30, 1.0, 1e30, 1.7e308])
@pytest.mark.parametrize("bias", [-1.7e308, 0.0, 1.7e308])
def test_no_setting_leaves_infinities_to_draw_from(temperature: float, penalty: float, bias: float) -> None:
    ids = [1, 2, 3]
    for params in (
        SamplingParams(temperature=temperature, repetition_penalty=penalty, logit_bias={4: bias, 5: bias}, min_tokens=9),
        SamplingParams(temperature=temperature, repetition_penalty=penalty, top_k=5, top_p=0.5, min_p=0.1),
    ):
        scores = adjust(logits(0), params, ids, 2, {0})
        shares = token_probabilities(scores, params)
        assert shares.isfinite().all()
        assert shares.sum().item() == pytest.approx(1.0)
        likeliest = sample(scores, params, torch.Generator().manual_seed(0))
        assert temperature > 1e-7 or scores[likeliest] == scores.max()
