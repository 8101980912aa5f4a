"""Weights in 8 and 4 bits: levels stay levels, errors stay within half a step, and NF4 is bitsandbytes' byte for byte."""

import hashlib

import pytest
import torch

from llavakit.model.linear import QuantizedLinear
from llavakit.ops.quantize.weights import KINDS, quantize_int8, quantize_nf4


def draw(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02


@pytest.mark.parametrize("shape", [(8, 64), (5, 96), (3, 7), (1, 1)])
def test_int8_errs_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    found = quantize_int8(weight)
    assert ((found.dense(torch.float32) - weight).abs() <= found.scales() / 2 * 1.0001).all()
    assert found.nbytes == weight.numel() + 4 * shape[0]


@pytest.mark.parametrize("shape", [(8, 64), (5, 96), (3, 7), (1, 1)])
def test_nf4_takes_the_nearest_level(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    found = quantize_nf4(weight)
    dense = found.dense(torch.float32)
    assert dense.shape == weight.shape
    most = found.scales().repeat_interleave(64)[: weight.numel()].view(shape)
    assert ((dense - weight).abs() <= most * 0.1521).all()  # half of the widest gap between levels
    assert torch.equal(quantize_nf4(dense).dense(torch.float32), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zeros(kind: str) -> None:
    assert torch.equal(KINDS[kind](torch.zeros(3, 64)).dense(torch.bfloat16), torch.zeros(3, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_weight(kind: str) -> None:
    weight, bias = KINDS[kind](draw(9, 70)), torch.arange(9.0)
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        expected = torch.nn.functional.linear(x.to(dtype), weight.dense(dtype), bias.to(dtype))
        assert torch.equal(QuantizedLinear(weight, bias)(x.to(dtype)), expected)


def test_nf4_is_bitsandbytes_own() -> None:
    weight = ((torch.arange(48 * 96) * 7919 % 1009 - 504) / 1009).view(48, 96)
    found = quantize_nf4(weight)
    # What quantize_4bit of bitsandbytes 0.50.2 makes of it.
    assert (
        hashlib.sha256(found.tensors["codes"].numpy().tobytes()).hexdigest()
        == "1a08b5f50a2a520e5ee61915d6d07cb8a5d5f411d2140cebb802e22500bdcb5d"
    )
    assert (
        hashlib.sha256(found.scales().numpy().tobytes()).hexdigest() == "04f2b421527ca5c5968cfe84be9058cdfbf6fc451351c9cfb1cbbb90af8ec55a"
    )
