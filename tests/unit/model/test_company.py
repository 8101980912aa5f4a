"""Every operation of a fused model gives a row the same bits in any company: the table that the engine's promise rests on."""

from __future__ import annotations

import functools
import itertools
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llavakit.model import surgery
from llavakit.model.decoder import rope_spec
from llavakit.model.fused import FusedLayer
from llavakit.model.linear import Linear, PackedLinear, RMSNorm
from llavakit.ops import gate as gate_module
from llavakit.ops import matmul
from llavakit.ops.attention import Packed
from llavakit.ops.cpu.library import Kernels, load_kernels
from llavakit.ops.gate import silu_gate, steady_gate
from llavakit.ops.rope import RopeSpec, rope_tables, rotate
from llavakit.pretrained.causal_lm import LlamaForCausalLM
from tests.tiny import decoder_config, llama, scale_weights

WIDTHS = (1, 7, 33, 64, 96, 200, 257)
ROWS = (*range(1, 19), 31, 32, 33, 48, 63, 64)
DTYPES = (torch.float32, torch.bfloat16)
Op = Callable[[Tensor], Tensor]


@pytest.fixture
def kernels() -> Kernels:
    """Our kernels, where they can be compiled."""
    found = load_kernels()
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def linear(dtype: torch.dtype, width: int, num_out: int, *, num_slices: int = 1, bias: bool = True) -> Op:
    layer = Linear(width, num_out, bias=bias)
    generator = torch.Generator().manual_seed(width)
    for weight in layer.parameters():
        nn.init.normal_(weight, generator=generator)
    layer = layer.to(dtype)
    return PackedLinear(layer.weight, layer.bias, num_slices=num_slices)


def norm(dtype: torch.dtype, width: int) -> Op:
    layer = RMSNorm(width, 1e-5).to(dtype)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(width))
    return layer


def fused_norm(dtype: torch.dtype, width: int, kernels: Kernels) -> Op:
    layer = norm(dtype, width)
    assert isinstance(layer, RMSNorm)
    return lambda x_MD: kernels.norm(x_MD, layer.weight, layer.eps, x_MD.flip(-1).contiguous())[1]


def fused_rotation(x_MD: Tensor, kernels: Kernels) -> Tensor:
    """Rotate rows that all stand at one position, each as two heads, one of them a key."""
    head_dim = x_MD.shape[1] // 6 * 2
    rows = x_MD[:, : 3 * head_dim].contiguous()
    tables = rope_tables(torch.full((x_MD.shape[0],), 1234), RopeSpec(head_dim=head_dim, theta=1e4), x_MD.dtype)
    return torch.cat([part.flatten(1) for part in kernels.rotary(rows, *tables, 1, 1)], -1)


def gate(x_MD: Tensor) -> Tensor:
    return steady_gate(x_MD, x_MD.flip(-1).contiguous())


def rotation(x_MD: Tensor) -> Tensor:
    """Rotate rows that all stand at one position, each as one head."""
    width = x_MD.shape[1] // 2 * 2
    tables = rope_tables(torch.full((x_MD.shape[0],), 1234), RopeSpec(head_dim=width, theta=1e4), x_MD.dtype)
    return rotate(x_MD[:, None, :width].contiguous(), tables)


def ops(dtype: torch.dtype, width: int) -> Iterator[tuple[str, Op]]:
    for num_out in (1, 40, 130):
        yield f"linear {width}x{num_out}", linear(dtype, width, num_out)
    yield "linear without bias", linear(dtype, width, 65, bias=False)
    if width % 4 == 0:
        yield "linear in slices", linear(dtype, width, 33, num_slices=4)
    if width > 1:
        yield "rotation", rotation
    yield "norm", norm(dtype, width)
    yield "gate", gate
    kernels = load_kernels()
    if kernels is not None:
        yield "fused norm", fused_norm(dtype, width, kernels)
        yield "gate of halves", lambda x_MD: kernels.gate_halves(torch.cat((x_MD, x_MD.flip(-1)), -1))
        if width >= 6:
            yield "fused rotation", functools.partial(fused_rotation, kernels=kernels)
    yield "sum", functools.partial(torch.add, other=1.5)


@pytest.mark.parametrize("is_ours", [True, False], ids=["kernels", "references"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_the_same_bits_among_any_number_of_rows(
    dtype: torch.dtype, width: int, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_ours:
        monkeypatch.setattr(matmul, "load_kernels", lambda: None)
        monkeypatch.setattr(gate_module, "load_kernels", lambda: None)
    chance = random.Random(width)
    x_MD = torch.randn(max(ROWS), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            for name, op in ops(dtype, width):
                torch.set_num_threads(1)
                alone = op(x_MD[:1])[0]
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    for num_rows in ROWS:
                        place = chance.randrange(num_rows)
                        company = x_MD[chance.sample(range(1, max(ROWS)), num_rows - 1)]
                        found = op(torch.cat((company[:place], x_MD[:1], company[place:])))[place]
                        assert torch.equal(found, alone), f"{name} with {num_rows} rows, {threads} threads, place {place}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_steady_gate_is_torchs(dtype: torch.dtype) -> None:
    gate_TD, up_TD = torch.randn(2, 33, 97, generator=torch.Generator().manual_seed(0)).mul(20).to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(steady_gate(gate_TD, up_TD), silu_gate(gate_TD, up_TD), atol=bound, rtol=bound)
    extreme = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]]).to(dtype)
    torch.testing.assert_close(steady_gate(extreme, torch.ones_like(extreme)), torch.relu(extreme), atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("num_slices", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_products_are_the_unpacked_ones(
    dtype: torch.dtype, num_slices: int, use_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not use_kernels:
        monkeypatch.setattr(matmul, "load_kernels", lambda: None)
    layer = Linear(96, 150)
    for weight in layer.parameters():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    layer = layer.to(dtype)
    x_BTD = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    bound = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(PackedLinear(layer.weight, layer.bias, num_slices=num_slices)(x_BTD), layer(x_BTD), atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_every_size_have_the_textbooks_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_rows, num_in, num_out in ((1, 1, 1), (3, 515, 63), (7, 1030, 65), (193, 64, 130), (400, 33, 16), (5, 1040, 1030)):
        x_MI, weight_OI = (torch.randn(rows, num_in, generator=generator).to(dtype) for rows in (num_rows, num_out))
        bias_O = torch.randn(num_out, generator=generator).to(dtype)
        expected = x_MI.double() @ weight_OI.double().T + bias_O.double()
        found = matmul.PackedWeight(weight_OI, bias_O).multiply(x_MI)
        bound = 1e-5 * num_in**0.5 if dtype == torch.float32 else 1e-2 * num_in**0.5
        torch.testing.assert_close(found.double(), expected, atol=bound, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_fusing_lets_each_weight_go_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    old = [weakref.ref(module) for module in model.modules() if isinstance(module, Linear)]
    alive = []
    pack = PackedLinear.__init__

    def counted(*arguments: Any, **options: Any) -> None:
        pack(*arguments, **options)
        alive.append(sum(reference() is not None for reference in old))

    monkeypatch.setattr(PackedLinear, "__init__", counted)
    surgery.fuse(model, torch.float32)
    joined = [3, 1, 2, 1] if any(isinstance(module, FusedLayer) for module in model.modules()) else [1] * 7
    assert [before - after for before, after in itertools.pairwise([*alive, 0])] == [*joined * 2, 1]


@pytest.mark.parametrize("kind", ["llama", "biases", "wide-heads", "qwen2", "slices"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_a_fused_layer_is_its_reference(dtype: torch.dtype, kind: str) -> None:
    config = decoder_config(kind)
    if kind == "slices":
        config.pretraining_tp = 2
    plain, model = (scale_weights(LlamaForCausalLM(config)).to(dtype) for _ in range(2))
    assert surgery.fuse(model, dtype)
    x_TD = torch.randn(37, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    rope, attn = rope_tables(torch.arange(37), rope_spec(config), dtype), Packed(torch.tensor([0, 20, 37]))
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    with torch.inference_mode():
        for layer, fused in zip(plain.model.layers, model.model.layers, strict=True):
            assert isinstance(fused, FusedLayer)
            torch.testing.assert_close(fused(x_TD, rope, attn), layer(x_TD, rope, attn), atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 6), (2, 2, 128)])
def test_rotated_heads_are_the_references_bits(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, kernels: Kernels
) -> None:
    for num_tokens in (1, 5, 300):
        counts = [num_heads, num_kv_heads, num_kv_heads]
        x_TX = torch.randn(num_tokens, sum(counts) * head_dim, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)
        rope = rope_tables(torch.arange(num_tokens) * 7, RopeSpec(head_dim=head_dim, theta=1e4), dtype)
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in x_TX.split([count * head_dim for count in counts], -1))
        found = kernels.rotary(x_TX, *rope, num_heads, num_kv_heads)
        for one, expected in zip(found, (rotate(q, rope), rotate(k, rope), v), strict=True):
            if dtype == torch.bfloat16:
                assert torch.equal(one, expected)
            torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_after_a_sum_is_the_references(dtype: torch.dtype, kernels: Kernels) -> None:
    for num_rows, width in ((1, 64), (5, 7), (40, 1000), (3, 4096)):
        x_TD, added_TD = torch.randn(2, num_rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        layer = norm(dtype, width)
        assert isinstance(layer, RMSNorm)
        total, found = kernels.norm(x_TD, layer.weight, layer.eps, added_TD)
        assert torch.equal(total, x_TD + added_TD)
        bound = 1e-6 if dtype == torch.float32 else 1.6e-2  # where the two differ by the last bit before they are rounded
        torch.testing.assert_close(found, layer(total), atol=bound, rtol=bound)
        same, alone = kernels.norm(total, layer.weight, layer.eps)
        assert same is total
        assert torch.equal(alone, found)
