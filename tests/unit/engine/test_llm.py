"""LLM: what it loads and refuses, and that batches keep the order."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llavakit.engine.llm import LLM
from llavakit.errors import CapacityError, ConfigError, PromptError
from llavakit.model.linear import QuantizedLinear
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.types import Conversation, SamplingParams
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.tiny import llama, llava, save_llava, tiny_processor, tiny_tokenizer

PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 30, 20))
SHORT = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llm") / "model")


def test_batches_keep_the_order_and_the_answers(folder: Path) -> None:
    conversations = [
        Conversation.ask(text, *([PICTURE] if index % 2 else [])) for index, text in enumerate(("one", "two", "a circle", "4"))
    ]
    one_by_one, in_pairs = (LLM(folder, dtype="float32", max_batch=size) for size in (1, 3))
    assert in_pairs.chat(conversations, SHORT) == [one_by_one.chat(conversation, SHORT) for conversation in conversations]
    assert in_pairs.chat([], SHORT) == []


def test_the_last_event_of_a_stream_holds_the_completion(folder: Path) -> None:
    llm = LLM(folder, dtype="float32")
    events = list(llm.stream(Conversation.ask("what is there?", PICTURE), SHORT))
    assert [event.completion for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].completion == llm.chat(Conversation.ask("what is there?", PICTURE), SHORT)


def test_the_templates_stop_strings_and_end_tokens_end_answers(folder: Path) -> None:
    llm = LLM(folder, dtype="float32")
    question, text = Conversation.ask("what?", PICTURE), llm.chat(Conversation.ask("what?", PICTURE), SHORT).text
    v1, middle = llm.processor.template, len(text) // 2
    stopping = LLM.of(llm.core, replace(llm.processor, template=replace(v1, stops=(text[middle:],))))
    assert stopping.chat(question, SHORT).text == text[: text.index(text[middle:])]
    assert stopping.chat(question, replace(SHORT, ignore_eos=True)).text == text
    ends = replace(llm.processor, template=replace(v1, end_tokens=("<pad>",)))
    assert ends.end_ids == {ends.tokenizer.eos_token_id, ends.tokenizer.find_token("<pad>")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_what_runs(folder: Path, dtype: str) -> None:
    llm = LLM(folder, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    assert {weight.dtype for weight in llm.core.parameters()} == {getattr(torch, dtype)}
    assert llm.chat(Conversation.ask("what?", PICTURE), SHORT).usage.completion_tokens <= 6


def test_float16_files_run_in_bfloat16_on_a_cpu_and_that_is_said(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llava().half()
    model.save_pretrained(tmp_path / "half", processor=LlavaProcessor.from_pretrained(folder))
    assert next(LLM(tmp_path / "half", device="cpu").core.parameters()).dtype == torch.bfloat16
    assert "running float16 weights in bfloat16" in caplog.text


def test_what_cannot_answer_about_pictures_is_refused(tmp_path: Path, folder: Path) -> None:
    llama().save_pretrained(tmp_path / "text", tokenizer=tiny_tokenizer())
    with pytest.raises(PromptError, match="without a vision tower; ask without a picture"):
        LLM(tmp_path / "text", device="cpu").chat(Conversation.ask("what?", PICTURE))
    with pytest.raises(ConfigError, match="dtype must be one of float32"):
        LLM(folder, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_batch must be at least 1, got 0"):
        LLM(folder, max_batch=0)


def test_a_language_model_alone_answers_through_its_template(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    llm = LLM(tmp_path, device="cpu")
    answer = llm.chat(Conversation.ask("Is there a ring?"), SHORT)
    ids = llm.processor.prompt(Conversation.ask("Is there a ring?")).ids
    expected = model.generate(torch.tensor([ids]), max_new_tokens=len(answer.ids))[0, len(ids) :].tolist()
    assert list(answer.ids) == expected


def test_end_ids_of_generation_config_end_answers_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    llm = LLM(folder, device="cpu", dtype="float32")
    ids = llm.chat(Conversation.ask("what?", PICTURE), SamplingParams(max_tokens=8, ignore_eos=True)).ids
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[3]]}))
    other = LLM(tmp_path / "model", device="cpu", dtype="float32")
    ended = other.chat(Conversation.ask("what?", PICTURE), SamplingParams(max_tokens=8))
    assert ended.ids == ids[: ids.index(ids[3]) + 1]
    assert ended.finish_reason == "stop"


def test_several_answers_are_drawn_with_seeds_in_a_row(folder: Path) -> None:
    llm = LLM(folder, device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=6, temperature=20.0, seed=5, ignore_eos=True)
    together = llm.chat(Conversation.ask("what?", PICTURE), replace(params, n=3))
    alone = [llm.chat(Conversation.ask("what?", PICTURE), replace(params, seed=5 + draw)).ids for draw in range(3)]
    assert [together.ids, *(other.ids for other in together.others)] == alone
    assert len(set(alone)) == 3
    streamed = [event.completion for event in llm.stream(Conversation.ask("what?", PICTURE), replace(params, n=3)) if event.completion]
    assert sorted(completion.ids for completion in streamed) == sorted(alone)


@pytest.mark.catalogue("D5")
def test_rows_beyond_the_tokenizer_are_never_chosen(folder: Path) -> None:
    model, processor = llava(), LlavaProcessor.from_pretrained(folder)
    num_ids = len(processor.tokenizer)
    assert num_ids < model.text_config.vocab_size
    model.language_model.lm_head.weight.data[num_ids:] *= 1e3
    llm = LLM.of(model, processor)
    for temperature in (0.0, 5.0):
        answer = llm.chat(Conversation.ask("what?", PICTURE), SamplingParams(max_tokens=8, temperature=temperature, seed=0))
        assert max(answer.ids) < num_ids


def test_preprocessing_is_the_files_own_unless_asked_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llava().save_pretrained(tmp_path, processor=tiny_processor(image_processor=ImageProcessor(size_px=28, crop_px=28, aspect="crop")))
    LLM(tmp_path, device="cpu")
    assert "LLaVA-1.5 was trained on pictures padded to a square; preprocess=pad does as in training" in caplog.text
    caplog.clear()
    padded = LLM(tmp_path, device="cpu", preprocess="pad")
    assert isinstance(padded.processor, LlavaProcessor)
    assert padded.processor.image_processor.aspect == "pad"
    assert not caplog.text


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_still_answer(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    whole, small = LLM(device="cpu", dtype="float32"), LLM(device="cpu", dtype="float32", quantize=kind)  # type: ignore[arg-type]
    assert "last bits" in caplog.text
    picture = (Path(__file__).parents[3] / "examples" / "scene.png").read_bytes()
    question = Conversation.ask("What color is the star?", picture)
    assert small.chat(question, SHORT).text == whole.chat(question, SHORT).text
    assert [type(module) for module in small.core.modules() if isinstance(module, QuantizedLinear)]
    with pytest.raises(ConfigError, match="quantize must be none, int8 or nf4, got 'int2'"):
        LLM(quantize="int2")  # type: ignore[arg-type]


def test_memory_limits_what_a_request_may_hold(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    page_bytes = 2 * 2 * 2 * 32 * 32 * 4  # keys and values, layers, heads, width in memory, tokens, bytes
    small = LLM(folder, dtype="float32", device="cpu", kv_memory=7 * page_bytes)
    assert "memory holds a cache of 224 positions, the model has 256" in caplog.text
    assert small.requests.context_len == 224
    whole = small.chat(Conversation.ask("what?", PICTURE), SamplingParams(ignore_eos=True))
    assert whole.usage.prompt_tokens + whole.usage.completion_tokens == 224
    with pytest.raises(CapacityError, match="the request may fill 11 blocks of 32 tokens and the cache has 7; lower max_tokens or n"):
        small.chat(Conversation.ask("what?", PICTURE), SamplingParams(temperature=1.0, n=3, ignore_eos=True))
    with pytest.raises(CapacityError, match="a cache needs at least 32768 bytes for 32 tokens"):
        LLM(folder, dtype="float32", device="cpu", kv_memory=1000)


def test_parameters_are_for_all_or_one_for_each(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", device="cpu")
    questions = [Conversation.ask(text) for text in ("one", "two")]
    found = llm.chat(questions, [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=5, ignore_eos=True)])
    assert [len(completion.ids) for completion in found] == [2, 5]
    with pytest.raises(PromptError, match="there are 2 requests and 1 params; give one for all, or one for each"):
        llm.chat(questions, [SHORT])


def test_progress_is_shown_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(folder, dtype="float32", device="cpu")
    llm.chat([Conversation.ask("one"), Conversation.ask("two")], SHORT, progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert not shown.out
