"""ops.quantize.layouts: packing loses nothing, and lies as the published definitions say."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llavakit.ops.quantize.layouts import LAYOUTS, PackedLayout, dequantize, num_groups
from tests.packed_folders import RECIPES, Recipe, awq_words, bit_stream, draw_module

KINDS = [*LAYOUTS]


def unsigned(words: Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**32))
def test_packing_loses_nothing_in_either_direction(kind: tuple[str, str, int], rows: int, columns: int, seed: int) -> None:
    layout, generator = LAYOUTS[kind], torch.Generator().manual_seed(seed)
    shape = (rows * len(layout.order), columns * len(layout.order))
    codes = torch.randint(0, 2**layout.bits, shape, generator=generator, dtype=torch.uint8)
    words = torch.randint(-(2**31), 2**31, (rows * layout.block_words, columns * layout.block_words), generator=generator).int()
    for pack, unpack in ((layout.pack, layout.unpack), (layout.pack_zeros, layout.unpack_zeros)):
        assert torch.equal(unpack(pack(codes)), codes)
        assert torch.equal(pack(unpack(words)), words)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_words_are_those_of_the_definition(kind: tuple[str, str, int]) -> None:
    method, version, bits = kind
    codes = torch.randint(0, 2**bits, (64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    zeros = codes[:3] if version != "gptq by GPTQModel" else codes[:3].clamp(min=1)  # of 0 see below
    less = int(version in ("gptq", "gptq by GPTQModel"))
    if method == "awq":
        wanted, stored = [awq_words(row) for row in codes.tolist()], [awq_words(row) for row in zeros.tolist()]
    else:
        wanted = [list(row) for row in zip(*(bit_stream(column, bits) for column in codes.T.tolist()), strict=True)]
        stored = [bit_stream([(zero - less) % 2**bits for zero in row], bits) for row in zeros.tolist()]
    assert unsigned(LAYOUTS[kind].pack(codes)) == wanted
    assert unsigned(LAYOUTS[kind].pack_zeros(zeros)) == stored


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, (7, 0, 0)), (9, (7 << 27, 0, 0)), (10, (3 << 30, 1, 0)), (11, (0, 7 << 1, 0)), (21, (0, 1 << 31, 3)), (31, (0, 0, 7 << 29))],
)
def test_three_bits_go_on_in_the_next_word(value: int, words: tuple[int, ...]) -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[value] = 7
    assert unsigned(LAYOUTS["gptq", "gptq", 3].pack(codes).T) == [list(words)]


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_zeros_of_0_borrow_as_in_gptqmodels_files(bits: int, ones: int) -> None:
    zeros = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    assert (zeros == 0).any()
    plain = unsigned(LAYOUTS["gptq", "gptq_v2", bits].pack_zeros(zeros))
    assert unsigned(LAYOUTS["gptq", "gptq by GPTQModel", bits].pack_zeros(zeros)) == [
        [(word - ones) % 2**32 for word in row] for row in plain
    ]


def test_values_that_do_not_fit_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="fit"):
        LAYOUTS["awq", "gemm", 4].pack(torch.full((1, 8), 16, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="whole"):
        LAYOUTS["awq", "gemm", 4].pack(torch.zeros(8, 7, dtype=torch.uint8))


@pytest.mark.parametrize(("num_inputs", "size", "groups"), [(64, -1, 1), (64, 32, 2), (64, 40, 2), (64, 128, 1), (0, 8, 0)])
def test_groups_are_counted(num_inputs: int, size: int, groups: int) -> None:
    assert num_groups(num_inputs, size) == groups


@pytest.mark.parametrize("name", RECIPES)
def test_dense_weights_are_those_of_the_definition(name: str) -> None:
    recipe = RECIPES[name]
    module = draw_module(recipe, 64, 32, random.Random(3))
    assert torch.equal(dense(recipe, module.tensors), module.dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    recipe = Recipe(bits=8)
    tensors = draw_module(recipe, 64, 32, random.Random(4)).tensors
    tensors["scales"] = torch.rand(2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    layout = LAYOUTS["gptq", "gptq", 8]
    groups = torch.arange(64) // 32
    differences = layout.unpack(tensors["qweight"]).double() - layout.unpack_zeros(tensors["qzeros"]).double()[groups]
    assert torch.equal(dense(recipe, tensors), (differences * tensors["scales"].double()[groups]).to(dtype).T)


@pytest.mark.parametrize("kind", [("gptq", "gptq", 3), ("awq", "gemm", 4)], ids=str)
def test_no_more_than_a_few_rows_of_codes_are_held(monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str, int]) -> None:
    layout, generator, unpack, sizes = LAYOUTS[kind], torch.Generator().manual_seed(5), PackedLayout.unpack, []
    codes = torch.randint(0, 2**layout.bits, (800, 32), generator=generator, dtype=torch.uint8)
    words, zeros = layout.pack(codes), layout.pack_zeros(codes[:1])

    def watched(self: PackedLayout, words: Tensor) -> Tensor:
        sizes.append(len(unpack(self, words)))
        return unpack(self, words)

    monkeypatch.setattr(PackedLayout, "unpack", watched)
    weight = dequantize(layout, words, zeros, torch.ones(1, 32), torch.zeros(800, dtype=torch.long))
    assert torch.equal(weight, codes.T.float() - codes[:1].T.float())
    assert sizes == [256, 256, 256, 32]


def dense(recipe: Recipe, tensors: dict[str, Tensor]) -> Tensor:
    groups = torch.arange(64) // (64 if recipe.group_size == -1 else min(recipe.group_size, 64))
    layout = LAYOUTS[recipe.method, recipe.version, recipe.bits]
    index = tensors["g_idx"].long() if "g_idx" in tensors else groups
    return dequantize(layout, tensors["qweight"], tensors["qzeros"], tensors["scales"], index)
