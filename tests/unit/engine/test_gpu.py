"""The engine on a GPU: the CPU's ids in float32, requests together, adapters, and weights of 8 and 4 bits."""

from pathlib import Path

import pytest

from llavakit.engine.llm import LLM
from llavakit.types import SamplingParams
from tests.tiny import save_llava
from tests.unit.engine.test_adapters import KINDS, save_adapter
from tests.unit.engine.test_engine import CONVERSATIONS, LONG, alone, tiny_llm

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("gpu") / "model")


def test_ids_are_those_of_the_cpu(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", device="cuda")
    assert [llm.chat(conversation, LONG).ids for conversation in CONVERSATIONS] == [alone(index) for index in range(4)]
    together = llm.chat(CONVERSATIONS * 3, LONG)
    assert [completion.ids for completion in together] == [alone(index) for index in range(4)] * 3


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
