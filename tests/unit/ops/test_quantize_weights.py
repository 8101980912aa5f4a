"""Weights in 8 and 4 bits: levels stay levels, errors stay within half a step, NF4 and its 8-bit scales are bitsandbytes' byte for byte.

Products with them give gradients to what is before them, and keep no dense weight.
"""

import functools
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from llavakit.model.linear import QuantizedLinear
from llavakit.ops.quantize.weights import KINDS, Quantized, quantize_int8, quantize_nf4
from tests.unit.ops.nf4_golden import FILE, cases, digest

ALL: dict[str, Callable[[torch.Tensor], Quantized]] = {**KINDS, "double": functools.partial(quantize_nf4, is_double=True)}


def draw(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02


@pytest.mark.parametrize("shape", [(8, 64), (5, 96), (3, 7), (1, 1)])
def test_int8_errs_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    found = quantize_int8(weight)
    assert ((found.dense(torch.float32) - weight).abs() <= found.scales.view(torch.float32) / 2 * 1.0001).all()
    assert found.nbytes == weight.numel() + 4 * shape[0]


@pytest.mark.parametrize("shape", [(8, 64), (5, 96), (3, 7), (1, 1)])
def test_nf4_takes_the_nearest_level(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    found = quantize_nf4(weight)
    dense = found.dense(torch.float32)
    assert dense.shape == weight.shape
    most = found.scales.view(torch.float32).flatten().repeat_interleave(64)[: weight.numel()].view(shape)
    assert ((dense - weight).abs() <= most * 0.1521).all()  # half of the widest gap between levels
    assert torch.equal(quantize_nf4(dense).dense(torch.float32), dense)


@pytest.mark.parametrize("kind", ALL)
def test_rows_of_zeros_stay_zeros(kind: str) -> None:
    for shape in ((3, 64), (1, 5)):
        assert torch.equal(ALL[kind](torch.zeros(shape)).dense(torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ALL)
def test_products_are_those_of_the_dense_weight(kind: str) -> None:
    weight, bias = ALL[kind](draw(9, 70)), torch.arange(9.0)
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        expected = torch.nn.functional.linear(x.to(dtype), weight.dense(dtype), bias.to(dtype))
        assert torch.equal(QuantizedLinear(weight, bias)(x.to(dtype)), expected)


def bytes_of(found: Quantized, num_values: int) -> dict[str, torch.Tensor]:
    """Return what counts of the parts: a last block may not be full."""
    num_blocks = -(-num_values // 64)
    return {"codes": found.codes.flatten()[: -(-num_values // 2)], "scales": found.scales.flatten()[: 4 * num_blocks]}


def test_nf4_is_bitsandbytes_own() -> None:
    expected = json.loads(FILE.read_text())
    for name, weight in cases():
        plain, double = quantize_nf4(weight), quantize_nf4(weight, is_double=True)
        assert double.nested is not None
        num_scales = -(-weight.numel() // 64)
        parts = bytes_of(plain, weight.numel()) | {
            "scale codes": double.scales.flatten()[:num_scales], "nested": double.nested[:-1], "offset": double.nested[-1:],
            "dense": plain.dense(weight.dtype), "dense double": double.dense(weight.dtype),
        }  # fmt: skip
        assert {part: digest(tensor) for part, tensor in parts.items()} == expected[name], name
        assert torch.equal(double.codes, plain.codes)


def test_double_scales_cost_an_eighth_of_a_bit_instead_of_half_a_bit() -> None:
    weight = draw(256, 1024)
    plain, double = (found.nbytes * 8 / weight.numel() for found in (quantize_nf4(weight), quantize_nf4(weight, is_double=True)))
    assert plain == 4.5
    assert double == pytest.approx(4.127, abs=2e-3)
    errors = [
        float((found.dense(torch.float32) - weight).norm() / weight.norm()) for found in (quantize_nf4(weight), ALL["double"](weight))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)  # 0.09


@pytest.mark.parametrize("kind", ALL)
def test_gradients_are_those_of_the_dense_weight(kind: str) -> None:
    weight, bias = ALL[kind](draw(9, 70)), torch.arange(9.0)
    layer = QuantizedLinear(weight, bias)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        layer.zero_grad()
        x, grad = (torch.randn(4, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype) for width in (70, 9))
        ours, theirs, their_bias = x.clone().requires_grad_(), x.clone().requires_grad_(), bias.clone().requires_grad_()
        layer(ours).backward(grad)
        torch.nn.functional.linear(theirs, weight.dense(dtype), their_bias.to(dtype)).backward(grad)
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(layer.bias.grad, their_bias.grad)


@pytest.mark.parametrize("kind", ALL)
def test_no_dense_weight_is_kept_for_the_backward_pass(kind: str) -> None:
    layer, kept = QuantizedLinear(ALL[kind](draw(256, 512)), None), 0
    own = {part.data_ptr() for part in (*layer.parameters(), *layer.buffers())}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in own else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        layer(layer(torch.randn(2, 512, requires_grad=True)).repeat(1, 2)).sum().backward()
    assert kept == 0


@pytest.mark.parametrize("kind", ALL)
def test_a_model_that_is_cast_moved_or_saved_keeps_every_bit(kind: str) -> None:
    weight = ALL[kind](draw(9, 70))
    layer = nn.Sequential(QuantizedLinear(weight, None))
    cast = layer.to(torch.bfloat16).to(torch.float16).half()
    state = cast.state_dict()
    assert {name: (part.dtype.is_floating_point, part.requires_grad) for name, part in state.items()} == dict.fromkeys(
        (f"0.{name}" for name in weight.stored()), (False, False)
    )
    other = nn.Sequential(QuantizedLinear(ALL[kind](torch.zeros(9, 70)), None))
    other.load_state_dict(state)
    x = torch.eye(70)
    assert torch.equal(other(x), weight.dense(torch.float32).T)
    assert torch.equal(cast(x), other(x))
