"""Decode steps from numbers alone, as CUDA graphs record them (here they are run): the same ids, whatever their size is rounded to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llavakit.engine.engine import Engine
from llavakit.engine.graphs import DecodeGraphs, _rounded
from llavakit.engine.llm import LLM
from llavakit.ops.pages import Pages
from llavakit.types import SamplingParams
from tests.tiny import save_llava
from tests.unit.engine.test_adapters import KINDS, save_adapter
from tests.unit.engine.test_engine import CONVERSATIONS, LONG, alone, answers, request, settings, tiny_llm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's
Compute = Callable[[], Tensor]


def run(compute: Compute) -> Compute:
    return compute


def with_graphs(engine: Engine, record: Callable[[Compute], Compute] = run) -> DecodeGraphs:
    """Make an engine decode as on a GPU, with pages that lie as there."""
    runner, num_blocks = engine.runner, engine.settings.num_blocks
    runner.pages = Pages(runner.pages.shape, num_blocks + 1, torch.float32, runner.device, is_by_token=True)
    for memory in (*runner.pages.keys, *runner.pages.values):
        memory.fill_(torch.nan)
    runner.graphs = DecodeGraphs(engine.core, runner.pages, num_blocks, record)
    return runner.graphs


def test_ids_stay_the_same() -> None:
    engine = Engine(tiny_llm().core, settings())
    graphs = with_graphs(engine)
    lengths = [24, 3, 17, 9, 24, 30, 2]
    requests = [
        request(CONVERSATIONS[index % 4], SamplingParams(max_tokens=length, ignore_eos=True)) for index, length in enumerate(lengths)
    ]
    for index, (completion, length) in enumerate(zip(answers(engine, requests), lengths, strict=True)):
        assert completion.ids[:24] == alone(index % 4)[:length], index
    assert graphs.num_replays > 15


def test_what_cannot_be_recorded_runs_without() -> None:
    def refuse(_: Compute) -> Compute:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = Engine(tiny_llm().core, settings())
    graphs = with_graphs(engine, refuse)
    (completion,) = answers(engine, [request()])
    assert completion.ids == alone(0)
    assert graphs.num_replays == 0


def test_single_tokens_of_a_picture_or_an_adapter_go_their_own_way(tmp_path: Path) -> None:
    engine = Engine(tiny_llm().core, settings(step_tokens=1))
    graphs = with_graphs(engine)
    found = answers(engine, [request(conversation) for conversation in CONVERSATIONS])
    assert [completion.ids for completion in found] == [alone(index) for index in range(4)]
    assert graphs.num_replays > 100
    model, adapters = save_llava(tmp_path / "model"), {"a": save_adapter(tmp_path / "adapter", **KINDS["everything"])}
    plain, llm = (LLM(model, dtype="float32", device="cpu", adapters=adapters) for _ in range(2))
    expected = [completion.ids for completion in plain.chat(CONVERSATIONS, LONG, adapter="a")]
    graphs = with_graphs(llm.engine)
    assert [completion.ids for completion in llm.chat(CONVERSATIONS, LONG, adapter="a")] == expected
    assert graphs.num_replays == 0
    assert [completion.ids for completion in llm.chat(CONVERSATIONS, LONG)] == [alone(index) for index in range(4)]
    assert graphs.num_replays > 0


def test_sizes_are_rounded_up_by_a_half_at_most() -> None:
    assert [_rounded(count) for count in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    assert all(count <= _rounded(count) < 1.5 * count + 1 for count in range(1, 5000))
