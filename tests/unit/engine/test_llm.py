"""LLM: what it loads and refuses, and that batches keep the order."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llavakit.engine.llm import LLM
from llavakit.errors import CheckpointError, ConfigError
from llavakit.types import Conversation, SamplingParams
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.tiny import llama, llava, save_llava

PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 30, 20))
SHORT = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llm") / "model")


def test_batches_keep_the_order_and_the_answers(folder: Path) -> None:
    conversations = [
        Conversation.ask(text, *([PICTURE] if index % 2 else [])) for index, text in enumerate(("one", "two", "a circle", "4"))
    ]
    one_by_one, in_pairs = (LLM.load(folder, dtype="float32", max_batch=size) for size in (1, 3))
    assert in_pairs.chat(conversations, SHORT) == [one_by_one.chat(conversation, SHORT) for conversation in conversations]
    assert in_pairs.chat([], SHORT) == []


def test_the_last_event_of_a_stream_holds_the_completion(folder: Path) -> None:
    llm = LLM.load(folder, dtype="float32")
    events = list(llm.stream(Conversation.ask("what is there?", PICTURE), SHORT))
    assert [event.completion for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].completion == llm.chat(Conversation.ask("what is there?", PICTURE), SHORT)


def test_the_templates_stop_strings_and_end_tokens_end_answers(folder: Path) -> None:
    llm = LLM.load(folder, dtype="float32")
    question, text = Conversation.ask("what?", PICTURE), llm.chat(Conversation.ask("what?", PICTURE), SHORT).text
    v1, middle = llm.processor.template, len(text) // 2
    stopping = LLM(llm.core, replace(llm.processor, template=replace(v1, stops=(text[middle:],))))
    assert stopping.chat(question, SHORT).text == text[: text.index(text[middle:])]
    assert stopping.chat(question, replace(SHORT, ignore_eos=True)).text == text
    ends = replace(llm.processor, template=replace(v1, end_tokens=("<pad>",)))
    assert ends.end_ids == {ends.tokenizer.eos_token_id, ends.tokenizer.find_token("<pad>")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_what_runs(folder: Path, dtype: str) -> None:
    llm = LLM.load(folder, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    assert {weight.dtype for weight in llm.core.parameters()} == {getattr(torch, dtype)}
    assert llm.chat(Conversation.ask("what?", PICTURE), SHORT).usage.completion_tokens <= 6


def test_float16_files_run_in_bfloat16_on_a_cpu_and_that_is_said(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llava().half()
    model.save_pretrained(tmp_path / "half", processor=LLM.load(folder).processor)
    assert next(LLM.load(tmp_path / "half", device="cpu").core.parameters()).dtype == torch.bfloat16
    assert "running float16 weights in bfloat16" in caplog.text


def test_what_cannot_answer_about_pictures_is_refused(tmp_path: Path, folder: Path) -> None:
    llama().save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match="without a vision tower; load it with LlamaForCausalLM"):
        LLM.load(tmp_path / "text")
    with pytest.raises(ConfigError, match="dtype must be auto or one of float32"):
        LLM.load(folder, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_batch must be at least 1, got 0"):
        LLM.load(folder, max_batch=0)
