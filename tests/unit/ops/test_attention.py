"""Attention contexts against the textbook formula: packed segments; and rotary positions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llavakit.ops.attention import Packed
from llavakit.ops.rope import RopeSpec, rope_tables, rotate

HEADS, WIDTH = 4, 8
ROPE = RopeSpec(head_dim=WIDTH, theta=10000.0)


def textbook(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    """Causal attention of one sequence, head by head, row by row."""
    group = q_TNH.shape[1] // k_TKH.shape[1]
    rows = []
    for position in range(q_TNH.shape[0]):
        heads = []
        for head in range(q_TNH.shape[1]):
            keys, values = k_TKH[: position + 1, head // group], v_TKH[: position + 1, head // group]
            heads.append((keys @ q_TNH[position, head] / math.sqrt(WIDTH)).softmax(0) @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def draw(num_tokens: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v = (torch.randn(num_tokens, heads, WIDTH, generator=generator) for heads in (HEADS, kv_heads, kv_heads))
    return q, k, v


def cut(tensors: tuple[Tensor, Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor[rows] for tensor in tensors)
    return q, k, v


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(9,), (1, 1, 1), (4, 1, 6)])
def test_packed_segments_attend_to_themselves_alone(lengths: tuple[int, ...], kv_heads: int) -> None:
    tensors = draw(sum(lengths), kv_heads)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    expected = torch.cat([textbook(*cut(tensors, slice(start, stop))) for start, stop in pairwise(bounds.tolist())])
    torch.testing.assert_close(Packed(bounds).attend(0, *tensors), expected)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k, _ = draw(1, 1)

    def score(at_q: int, at_k: int) -> float:
        tables = [rope_tables(torch.tensor([at]), ROPE, torch.float32) for at in (at_q, at_k)]
        return float(rotate(q, tables[0])[0, 0] @ rotate(k, tables[1])[0, 0])

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-4)


def test_rotation_keeps_lengths_and_position_zero() -> None:
    q, _, _ = draw(5, 1)
    tables = rope_tables(torch.tensor([0, 1, 50, 4095, 10**6]), ROPE, torch.float32)
    torch.testing.assert_close(rotate(q, tables).norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(rotate(q, tables)[0], q[0])
