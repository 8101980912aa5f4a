"""Attention of segments as one operator: Packed's values and gradients, and one graph for all packings."""

import pytest
import torch
from torch._dynamo.utils import counters

from llavakit.model.surgery import attend_by, compile_layers
from llavakit.ops.attention import Packed
from llavakit.ops.segmented import Segmented
from tests.toy_run import toy_core, toy_source

BOUNDS = torch.tensor([0, 1, 34, 40, 90], dtype=torch.int32)


def draw(heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads)
    return tuple(torch.randn(90, count, 16, generator=generator).to(dtype).requires_grad_() for count in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)], ids=str)
def test_values_and_gradients_are_those_of_packed(heads: int, kv_heads: int, window: int | None, dtype: torch.dtype, bound: float) -> None:
    found = []
    for context in (Packed(BOUNDS, window), Segmented(BOUNDS, window)):
        heads_TNH = draw(heads, kv_heads, dtype)
        o_TNH = context.attend(0, *heads_TNH)
        (o_TNH.float() * torch.arange(90)[:, None, None]).sum().backward()
        found.append([o_TNH.detach(), *(tensor.grad for tensor in heads_TNH)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, atol=bound * float(theirs.abs().max()), rtol=bound)


def test_the_operator_is_one_in_torchs_own_eyes() -> None:
    operands = draw(4, 2, torch.float32)
    torch.library.opcheck(torch.ops.llavakit.segmented_attention.default, (*operands, BOUNDS, 0))
    torch.library.opcheck(torch.ops.llavakit.segmented_attention.default, (*operands, BOUNDS, 5))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
def test_compiled_layers_have_one_graph_for_all_packings() -> None:
    """Twenty packings of other lengths and numbers: no graph break (fullgraph would raise), no graph but the first."""
    plain, compiled = (toy_core() for _ in range(2))
    attend_by(compiled, Segmented)
    compile_layers(compiled, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for number in range(20):
        batch = toy_source(number, samples_per_batch=2 + number).batch(0).batch
        losses = []
        for core in (plain, compiled):
            core.zero_grad()
            losses.append(core.loss_packed(batch).sum)
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0.0)
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert sum(counters["graph_break"].values()) == 0
