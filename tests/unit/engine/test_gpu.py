"""The engine on a GPU: the CPU's ids in float32, requests together, adapters, and weights of 8 and 4 bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llavakit.engine.llm import LLM
from llavakit.engine.request import Request
from llavakit.ops.gathered import Gathered
from llavakit.ops.pages import Pages, PageShape
from llavakit.ops.quantize.weights import KINDS as KINDS_OF_WEIGHTS
from llavakit.types import SamplingParams
from tests.tiny import save_llava
from tests.unit.engine.test_adapters import KINDS, save_adapter
from tests.unit.engine.test_engine import CONVERSATIONS, LONG, alone, tiny_llm
from tests.unit.ops.test_paged import NUM_PAGES, attend, draw, tables, textbook

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]  # the warnings are peft's


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("gpu") / "model")


def test_ids_are_those_of_the_cpu(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", device="cuda")
    assert [llm.chat(conversation, LONG).ids for conversation in CONVERSATIONS] == [alone(index) for index in range(4)]
    together = llm.chat(CONVERSATIONS * 3, LONG)
    assert [completion.ids for completion in together] == [alone(index) for index in range(4)] * 3
    assert llm.engine.runner.graphs is not None
    assert llm.engine.runner.graphs.num_replays > 40


def test_requests_come_and_go_while_graphs_run(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", device="cuda", max_batch=5, kv_memory=40 * 32768, prefix_cache=False)
    lengths = [24, 3, 17, 9, 24, 20, 2] * 3
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    found = llm.chat([CONVERSATIONS[index % 4] for index in range(len(lengths))], params)
    assert [completion.ids for completion in found] == [alone(index % 4)[:length] for index, length in enumerate(lengths)]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("group", "width"), [(1, 128), (4, 64), (3, 24)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_attention_has_the_textbooks_values(group: int, width: int, window: int | None, dtype: torch.dtype, bound: float) -> None:
    shape = PageShape(num_layers=1, num_kv_heads=2, head_dim=width, window=window)
    sequences = [tuple(part.cuda() for part in draw(length, shape, group, dtype, length)) for length in (1, 33, 70, 300)]
    pages = Pages(shape, NUM_PAGES, dtype, torch.device("cuda"))
    for memory in (*pages.keys, *pages.values):
        memory.fill_(torch.nan)
    found = attend(pages, sequences, tables((1, 33, 70, 300), 0), (33, 1, 1, 100, 1), Gathered)  # type: ignore[arg-type]
    for output, sequence in zip(found, sequences, strict=True):
        torch.testing.assert_close(output.double(), textbook(sequence, window), atol=bound, rtol=bound)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_answers_and_finds_pictures_again(folder: Path, dtype: str) -> None:
    llm = LLM(folder, dtype=dtype, device="cuda")  # type: ignore[arg-type]
    first, second = (llm.chat(CONVERSATIONS, LONG) for _ in range(2))
    assert {completion.finish_reason for completion in (*first, *second)} == {"length"}
    assert llm.engine.stats().num_found_tokens > 0
    assert llm.engine.stats().num_encoded_pictures == 4


def test_draws_hold_their_seeds(folder: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=5.0, seed=3, ignore_eos=True, n=2)
    expected = tiny_llm().chat(CONVERSATIONS[1], params)
    found = LLM(folder, dtype="float32", device="cuda").chat(CONVERSATIONS[1], params)
    assert (found.ids, found.others[0].ids) == (expected.ids, expected.others[0].ids)


def test_adapters_run_beside_the_model(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", **KINDS["everything"])
    here, there = (LLM(folder, dtype="float32", device=device, adapters={"a": adapter}) for device in ("cpu", "cuda"))
    expected = [completion.ids for completion in here.chat(CONVERSATIONS, LONG, adapter="a")]
    assert [completion.ids for completion in there.chat(CONVERSATIONS, LONG, adapter="a")] == expected


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_answer_as_on_the_cpu(folder: Path, kind: str) -> None:
    here, there = (LLM(folder, dtype="float32", device=device, quantize=kind) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    assert {weight.device.type for weight in there.core.parameters()} == {"cuda"}
    for conversation in CONVERSATIONS:
        assert there.chat(conversation, LONG).ids == here.chat(conversation, LONG).ids
    assert there.engine.runner.graphs is not None
    assert there.engine.runner.graphs.num_replays > 20


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_have_the_same_bytes_and_values_as_on_the_cpu(kind: str) -> None:
    weight = torch.randn(100, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    here, there = KINDS_OF_WEIGHTS[kind](weight), KINDS_OF_WEIGHTS[kind](weight.cuda())
    assert torch.equal(here.codes, there.codes.cpu())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(here.dense(dtype), there.dense(dtype).cpu())


def test_what_fails_on_the_gpu_fails_alone(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", device="cuda")

    def bad(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ValueError("a hook of a caller")

    prompt = llm.requests.chat(CONVERSATIONS[0], LONG)
    hooked = Request(prompt.prompt, LONG, replace(prompt.terms, hooks=(bad,)))
    numbers = [llm.engine.add(one) for one in (hooked, *(llm.requests.chat(conversation, LONG) for conversation in CONVERSATIONS))]
    found = {event.request: event.completion for event in llm.engine.run() if event.completion is not None}
    assert found[numbers[0]].finish_reason == "error"
    assert [found[number].ids for number in numbers[1:]] == [alone(index) for index in range(4)]
