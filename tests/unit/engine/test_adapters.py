"""LoRA adapters beside the model: what merged weights answer, each request its own, loaded and dropped while others run."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llavakit.engine.engine import Engine, EngineSettings
from llavakit.engine.llm import LLM
from llavakit.errors import CheckpointError, ConfigError, PromptError
from llavakit.types import Conversation, SamplingParams
from tests.tiny import hf_llava, save_llava
from tests.unit.engine.test_engine import CONVERSATIONS, answers, request

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's
LONG = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0)
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {"r": 4, "lora_alpha": 8, "target_modules": r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj|o_proj)"},
    "everything": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
}


def save_adapter(folder: Path, seed: int = 5, **options: Any) -> Path:
    """Save an adapter of the oracle's class that does something."""
    wrapped = get_peft_model(hf_llava(), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.2, generator=generator)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {"model": save_llava(root / "model"), **{kind: save_adapter(root / kind, **options) for kind, options in KINDS.items()}}


@functools.cache
def merged(model: Path, adapter: Path) -> LLM:
    return LLM(adapter, base=model, dtype="float32", device="cpu")


def test_adapters_answer_as_merged_weights_do_each_its_own_requests(folders: dict[str, Path]) -> None:
    llm = LLM(folders["model"], dtype="float32", device="cpu", adapters={kind: folders[kind] for kind in KINDS})
    plain = LLM(folders["model"], dtype="float32", device="cpu").chat(CONVERSATIONS, LONG)
    alone = {kind: llm.chat(CONVERSATIONS, LONG, adapter=kind) for kind in KINDS}
    assert [one.ids for one in llm.chat(CONVERSATIONS, LONG)] == [one.ids for one in plain]
    for kind in KINDS:
        expected = merged(folders["model"], folders[kind]).chat(CONVERSATIONS, LONG)
        assert [one.ids for one in alone[kind]] == [one.ids for one in expected] != [one.ids for one in plain]
        for found, wanted in zip(alone[kind], expected, strict=True):
            assert found.logprobs is not None
            assert wanted.logprobs is not None
            pairs = zip(found.logprobs, wanted.logprobs, strict=True)
            assert all(ours.logprob == pytest.approx(theirs.logprob, abs=1e-3) for ours, theirs in pairs)


def test_company_through_other_adapters_changes_no_bit(folders: dict[str, Path]) -> None:
    llm = LLM(folders["model"], dtype="float32", device="cpu", adapters={kind: folders[kind] for kind in KINDS})
    names = ("", *KINDS)
    single = {name: llm.chat(CONVERSATIONS, LONG, adapter=name) for name in names}
    engine = Engine(llm.core, EngineSettings(num_blocks=64, step_tokens=11))
    engine.runner.adapting, engine._adapters = llm.engine.runner.adapting, llm.engine._adapters
    together = answers(engine, [request(conversation, LONG, adapter=name) for conversation in CONVERSATIONS for name in names])
    expected = [single[name][index] for index in range(len(CONVERSATIONS)) for name in names]
    assert [(one.ids, one.logprobs) for one in together] == [(one.ids, one.logprobs) for one in expected]


def test_a_name_that_comes_back_finds_nothing_of_the_old_one(folders: dict[str, Path], tmp_path: Path) -> None:
    llm = LLM(folders["model"], dtype="float32", device="cpu", adapters={"a": folders["everything"]})
    question = Conversation.ask("what is there? " * 6, CONVERSATIONS[0].images[0].data)
    first = llm.chat(question, LONG, adapter="a")
    assert llm.chat(question, LONG, adapter="a") == first
    llm.drop_adapter("a")
    with pytest.raises(PromptError, match="there is no adapter 'a'; loaded are none"):
        llm.chat(question, LONG, adapter="a")
    other = save_adapter(tmp_path / "other", seed=9, **KINDS["everything"])
    llm.load_adapter("a", other)
    assert llm.chat(question, LONG, adapter="a").ids == merged(folders["model"], other).chat(question, LONG).ids != first.ids


def test_a_dropped_adapter_ends_what_it_began(folders: dict[str, Path]) -> None:
    llm = LLM(folders["model"], dtype="float32", device="cpu", adapters={"a": folders["decoder"]})
    whole = llm.chat(CONVERSATIONS[0], LONG, adapter="a")
    stream = llm.stream(CONVERSATIONS[0], LONG, adapter="a")
    tokens = [next(stream).token]
    llm.drop_adapter("a")
    assert (*tokens, *(event.token for event in stream)) == whole.ids


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "does more than add to products.*llava merge makes a whole model"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.*llava merge"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*llava merge"),
    ],
    ids=["DoRA", "head", "embedding"],
)
def test_what_is_no_sum_is_refused(folders: dict[str, Path], tmp_path: Path, options: dict[str, Any], told: str) -> None:
    llm = LLM(folders["model"], dtype="float32", device="cpu")
    with pytest.raises(CheckpointError, match=told):
        llm.load_adapter("a", save_adapter(tmp_path / "adapter", r=2, **options))
    with pytest.raises(ConfigError, match="needs a name of its own"):
        llm.load_adapter("", folders["decoder"])
    assert llm.chat(CONVERSATIONS[1], replace(LONG, max_tokens=2)).ids


def test_an_adapter_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    llm = LLM(folders["model"], dtype="float32", device="cpu")
    adapter = save_adapter(tmp_path / "adapter", r=2, target_modules=["down_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: weight[:, :-1].contiguous() if "lora_A" in name else weight for name, weight in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="does not fit the model"):
        llm.load_adapter("a", adapter)
