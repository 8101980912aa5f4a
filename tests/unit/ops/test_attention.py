"""Attention contexts against the textbook formula: packed segments, prefill, ragged decode; and rotary positions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llavakit.ops.attention import Packed
from llavakit.ops.cached import CacheShape, Decode, KvCache, Prefill
from llavakit.ops.rope import RopeSpec, rope_tables, rotate

HEADS, WIDTH = 4, 8
ROPE = RopeSpec(head_dim=WIDTH, theta=10000.0)
CPU = torch.device("cpu")


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


def cut(tensors: tuple[Tensor, Tensor, Tensor], rows: slice | list[int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor[rows] for tensor in tensors)
    return q, k, v


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(9,), (1, 1, 1), (4, 1, 6)])
def test_packed_segments_attend_to_themselves_alone(lengths: tuple[int, ...], kv_heads: int) -> None:
    tensors = draw(sum(lengths), kv_heads)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    expected = torch.cat([textbook(*cut(tensors, slice(start, stop))) for start, stop in pairwise(bounds.tolist())])
    torch.testing.assert_close(Packed(bounds).attend(0, *tensors), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(5, 5), (2, 7, 1)])
def test_prefill_then_decode_equals_the_whole(lengths: tuple[int, ...], kv_heads: int) -> None:
    steps = 3
    rows = [draw(length + steps, kv_heads) for length in lengths]
    expected = [textbook(*row) for row in rows]
    shape = CacheShape(num_layers=1, num_kv_heads=kv_heads, head_dim=WIDTH, capacity=max(lengths) + steps)
    cache = KvCache(shape, len(lengths), torch.float32, CPU)
    prompts = zip(*(cut(row, slice(0, length)) for row, length in zip(rows, lengths, strict=True)), strict=True)
    q, k, v = (torch.cat(part) for part in prompts)
    found = Prefill(cache, 0, lengths).attend(0, q, k, v).split(list(lengths))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row], expected[row][:length])
    for step in range(steps):
        new = zip(*(cut(row, [length + step]) for row, length in zip(rows, lengths, strict=True)), strict=True)
        q, k, v = (torch.cat(part) for part in new)
        wanted = torch.stack([expected[row][length + step] for row, length in enumerate(lengths)])
        torch.testing.assert_close(Decode(cache).attend(0, q, k, v), wanted)


@pytest.mark.parametrize("length", [1, 9, 31, 107])
def test_a_row_gets_the_same_bits_beside_rows_of_its_length_and_of_others(length: int) -> None:
    width = 64  # heads as wide as real ones; of rows that are no multiple of a cache line the BLAS may sum otherwise

    def first_row(lengths: tuple[int, ...]) -> Tensor:
        cache = KvCache(CacheShape(num_layers=1, num_kv_heads=2, head_dim=width, capacity=max(lengths)), len(lengths), torch.float32, CPU)
        generator = torch.Generator().manual_seed(0)
        rows = [tuple(torch.randn(size, heads, width, generator=generator) for heads in (HEADS, 2, 2)) for size in lengths]
        q, k, v = (torch.cat([row[part] for row in rows]) for part in range(3))
        return Prefill(cache, 0, lengths).attend(0, q, k, v)[:length]

    alone = first_row((length,))
    assert torch.equal(alone, first_row((length,) * 3))
    assert torch.equal(alone, first_row((length, 4, 6)))


def test_kept_rows_move_with_their_lengths() -> None:
    cache = KvCache(CacheShape(num_layers=1, num_kv_heads=1, head_dim=WIDTH, capacity=4), 3, torch.float32, CPU)
    Prefill(cache, 0, (1, 2, 3)).attend(0, *draw(6, 1))
    kept = cache.keys[0][[2, 0]].clone()
    cache.keep([2, 0])
    assert cache.lengths == [3, 1]
    assert torch.equal(cache.keys[0], kept)


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
