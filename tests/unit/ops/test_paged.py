"""Paged attention: the textbook's values, and the same bits however the tokens came, whatever stands beside them or in memory."""

import functools
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from llavakit.ops.gathered import Gathered
from llavakit.ops.paged import Paged
from llavakit.ops.pages import PAGE, Pages, PageShape, Rows

CPU = torch.device("cpu")
NUM_PAGES = 24
Heads = tuple[Tensor, Tensor, Tensor]


def draw(num_tokens: int, shape: PageShape, group: int, dtype: torch.dtype, seed: int) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.num_kv_heads * group, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (torch.randn(num_tokens, count, shape.head_dim, generator=generator).to(dtype) for count in heads)
    return q, k, v


def tables(lengths: Sequence[int], seed: int) -> list[list[int]]:
    free = list(range(NUM_PAGES))
    random.Random(seed).shuffle(free)
    return [[free.pop() for _ in range(-(-length // PAGE))] for length in lengths]


KERNEL, REFERENCE = Paged, functools.partial(Paged, use_kernels=False)
Way = Callable[[Pages, Sequence[Rows]], Paged | Gathered]


def attend(
    pages: Pages, sequences: Sequence[Heads], places: Sequence[Sequence[int]], chunks: Sequence[int], way: Way = KERNEL
) -> list[Tensor]:
    """Run sequences through the cache side by side, the i-th step taking chunks[i] tokens of each."""
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    step = 0
    while any(begin < sequence[0].shape[0] for begin, sequence in zip(done, sequences, strict=True)):
        rows, parts, owners = [], [], []
        for index, (sequence, table) in enumerate(zip(sequences, places, strict=True)):
            begin, end = done[index], min(sequence[0].shape[0], done[index] + chunks[step % len(chunks)])
            if begin < end:
                rows.append(Rows(begin, end, table))
                parts.append([tensor[begin:end] for tensor in sequence])
                owners.append(index)
                done[index] = end
        q, k, v = (torch.cat([part[which] for part in parts]) for which in range(3))
        output = way(pages, rows).attend(0, q, k, v)
        for owner, piece in zip(owners, output.split([row.stop - row.first for row in rows]), strict=True):
            outputs[owner].append(piece)
        step += 1
    return [torch.cat(pieces) for pieces in outputs]


def textbook(sequence: Heads, window: int | None) -> Tensor:
    q_TNH, k_TKH, v_TKH = (tensor.double() for tensor in sequence)
    group, rows = q_TNH.shape[1] // k_TKH.shape[1], []
    for position in range(q_TNH.shape[0]):
        first = 0 if window is None else max(0, position + 1 - window)
        heads = []
        for head in range(q_TNH.shape[1]):
            keys, values = k_TKH[first : position + 1, head // group], v_TKH[first : position + 1, head // group]
            heads.append((keys @ q_TNH[position, head] / math.sqrt(q_TNH.shape[2])).softmax(0) @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def new_pages(shape: PageShape, dtype: torch.dtype, *, fill: float = math.nan, is_by_token: bool = False) -> Pages:
    pages = Pages(shape, NUM_PAGES, dtype, CPU, is_by_token=is_by_token)
    for memory in (*pages.keys, *pages.values):
        memory.fill_(fill)
    return pages


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("heads", "group", "width"), [(2, 2, 16), (1, 6, 64), (4, 1, 80), (1, 7, 128), (2, 1, 256)])
@pytest.mark.parametrize("way", [KERNEL, REFERENCE], ids=["kernel", "reference"])
def test_values_are_the_textbooks(heads: int, group: int, width: int, window: int | None, way: Way) -> None:
    shape = PageShape(num_layers=1, num_kv_heads=heads, head_dim=width, window=window)
    sequences = [draw(length, shape, group, torch.float32, length) for length in (1, 33, 70)]
    found = attend(new_pages(shape, torch.float32), sequences, tables((1, 33, 70), 0), (50, 1, 3), way)
    for output, sequence in zip(found, sequences, strict=True):
        torch.testing.assert_close(output.double(), textbook(sequence, window), atol=1e-5, rtol=1e-5)


def test_half_precision_stays_near_the_textbook() -> None:
    shape = PageShape(num_layers=1, num_kv_heads=2, head_dim=64)
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        sequence = draw(70, shape, 2, dtype, 1)
        for way in (KERNEL, REFERENCE):
            (found,) = attend(new_pages(shape, dtype), [sequence], tables((70,), 0), (70,), way)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), textbook(sequence, None), atol=bound, rtol=bound)


@pytest.mark.parametrize("way", [KERNEL, REFERENCE], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_gets_the_same_bits_in_any_company(dtype: torch.dtype, way: Way) -> None:
    before = torch.get_num_threads()
    try:
        for seed in range(12 if way is KERNEL else 3):
            chance = random.Random(seed)
            shape = PageShape(
                num_layers=1,
                num_kv_heads=chance.choice((1, 2, 3)),
                head_dim=chance.choice((8, 24, 64, 100)),
                window=chance.choice((None, 21)),
            )
            group, length = chance.choice((1, 2, 5, 8)), chance.choice((1, 31, 33, 65, 100))
            own = draw(length, shape, group, dtype, seed)
            torch.set_num_threads(1)
            (expected,) = attend(new_pages(shape, dtype), [own], tables((length,), 0), (length,), way)
            for fill, chunks, others, threads in ((1e30, (1,), (), 2), (math.nan, (7, 1, 32), (3, 40), 2), (0.0, (200,), (64, 1, 90), 2)):
                torch.set_num_threads(threads)
                company = [draw(other, shape, group, dtype, other) for other in others]
                pages = new_pages(shape, dtype, fill=fill)
                found = attend(pages, [*company, own], tables((*others, length), seed), chunks, way)
                assert torch.equal(found[-1], expected), (seed, chunks, others)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [None, 5, 40])
def test_the_way_of_other_devices_has_the_same_values(window: int | None, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavakit.ops.gathered._GATHERED", 3 * PAGE)  # sequences of one token come in several parts
    shape = PageShape(num_layers=1, num_kv_heads=2, head_dim=24, window=window)
    sequences = [draw(length, shape, group, torch.float32, length) for length in (1, 33, 70, 34)]
    pages = new_pages(shape, torch.float32, is_by_token=True)
    found = attend(pages, sequences, tables((1, 33, 70, 34), 0), (33, 1, 1, 2, 1), Gathered)
    for output, sequence in zip(found, sequences, strict=True):
        torch.testing.assert_close(output.double(), textbook(sequence, window), atol=1e-5, rtol=1e-5)


def test_copied_pages_hold_what_the_others_hold() -> None:
    shape = PageShape(num_layers=2, num_kv_heads=1, head_dim=32)
    pages = new_pages(shape, torch.float32)
    sequence = draw(40, shape, 1, torch.float32, 0)
    for layer in range(2):
        Paged(pages, [Rows(0, 39, [3, 5])]).attend(layer, *(tensor[:39] for tensor in sequence))
    pages.copy([5], [9])
    last = [Paged(pages, [Rows(39, 40, table)]).attend(0, *(tensor[39:] for tensor in sequence)) for table in ([3, 5], [3, 9])]
    assert torch.equal(*last)


def test_memory_is_told_before_it_is_taken() -> None:
    shape = PageShape(num_layers=3, num_kv_heads=2, head_dim=80)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pages = Pages(shape, 5, dtype, CPU)
        assert sum(memory.nbytes for memory in (*pages.keys, *pages.values)) == 5 * shape.page_bytes(dtype, CPU)
