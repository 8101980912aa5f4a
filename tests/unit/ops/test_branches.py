"""Branches after one stem: each equals its stem and itself as one sequence, in values and gradients, on either path."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llavakit.errors import InputError
from llavakit.ops.attention import causal_attention
from llavakit.ops.branches import Branched, attend_masked, attend_whole
from tests.unit.ops.test_attention import draw

Tensors = tuple[Tensor, Tensor, Tensor]
# Lengths and stems: pairs, plain sequences, three branches, a stem without any, branches that follow other segments.
PACKS = (
    ([5, 3, 4], [-1, 0, 0]),
    ([6], [-1]),
    ([4, 5, 2, 3, 1, 7], [-1, -1, 1, 1, -1, -1]),
    ([3, 2, 4, 1, 6, 3, 3], [-1, 0, 0, 0, -1, 4, 4]),
    ([3, 5, 2, 2, 1], [-1, -1, 0, 1, 0]),
    ([1, 1, 1], [-1, 0, 0]),
)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def one_by_one(tensors: Tensors, lengths: list[int], stems: list[int], window: int | None) -> Tensor:
    """Attend over each segment behind its stem, as a sequence of its own."""
    spans = [range(start, stop) for start, stop in pairwise(bounds(lengths).tolist())]
    outputs = []
    for span, stem in zip(spans, stems, strict=True):
        rows = torch.tensor([*(spans[stem] if stem >= 0 else ()), *span])
        q, k, v = (tensor[rows] for tensor in tensors)
        outputs.append(causal_attention(q, k, v, window=window)[-len(span) :])
    return torch.cat(outputs)


def given(lengths: list[int], kv_heads: int) -> Tensors:
    q, k, v = (tensor.requires_grad_() for tensor in draw(sum(lengths), kv_heads))
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("lengths", "stems"), PACKS)
def test_a_branch_equals_its_stem_and_itself(lengths: list[int], stems: list[int], kv_heads: int, window: int | None) -> None:
    ours, theirs = given(lengths, kv_heads), given(lengths, kv_heads)
    found = Branched(bounds(lengths), torch.tensor(stems), window).attend(0, *ours)
    expected = one_by_one(theirs, lengths, stems, window)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(1.0, found.numel() + 1).view_as(found).sin()
    grads = [torch.autograd.grad((weights * o).sum(), tensors) for o, tensors in ((found, ours), (expected, theirs))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_before", [1, 7, 11])
@pytest.mark.parametrize("window", [None, 4, 9])
def test_both_ways_to_compute_a_further_branch_agree(window: int | None, num_before: int) -> None:
    tensors = draw(12, 2)
    torch.testing.assert_close(attend_whole(*tensors, num_before, window=window), attend_masked(*tensors, num_before, window=window))


def test_siblings_do_not_reach_each_other() -> None:
    lengths, stems = [4, 3, 3], [-1, 0, 0]
    attn = Branched(bounds(lengths), torch.tensor(stems))
    q, k, v = draw(10, 2)
    before = attn.attend(0, q, k, v)
    v = torch.cat((v[:4], v[4:7] + 1, v[7:]))
    after = attn.attend(0, q, k, v)
    assert torch.equal(after[:4], before[:4])
    assert torch.equal(after[7:], before[7:])
    assert not torch.allclose(after[4:7], before[4:7])


@pytest.mark.parametrize("stems", [[-1, 0, 1], [-1, 2, 0], [0, -1, -1], [-1, -1, 3]])
def test_what_cannot_be_a_stem_is_refused(stems: list[int]) -> None:
    with pytest.raises(InputError, match="must continue an earlier one"):
        Branched(bounds([2, 2, 2]), torch.tensor(stems))


def test_half_precision_stays_half() -> None:
    q, k, v = (tensor.bfloat16() for tensor in draw(9, 2))
    found = Branched(bounds([4, 2, 3]), torch.tensor([-1, 0, 0])).attend(0, q, k, v)
    assert found.dtype == torch.bfloat16
    exact = Branched(bounds([4, 2, 3]), torch.tensor([-1, 0, 0])).attend(0, q.float(), k.float(), v.float())
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)  # one rounding of the output


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("lengths", "stems"), PACKS)
def test_a_gpu_gives_what_the_cpu_gives(lengths: list[int], stems: list[int], window: int | None) -> None:
    tensors = draw(sum(lengths), 2)
    here = Branched(bounds(lengths), torch.tensor(stems), window).attend(0, *tensors)
    q, k, v = (tensor.cuda() for tensor in tensors)
    there = Branched(bounds(lengths).cuda(), torch.tensor(stems).cuda(), window).attend(0, q, k, v)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)
