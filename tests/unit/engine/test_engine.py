"""The engine: a request's ids are those of a recomputation, in any company, whatever is chunked, cached, preempted or aborted."""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit.engine.engine import Engine, EngineSettings
from llavakit.engine.llm import LLM
from llavakit.engine.request import Request, Terms, TokenEvent
from llavakit.errors import CapacityError, PromptError
from llavakit.model.llava import LlavaCore
from llavakit.ops.attention import Packed
from llavakit.processing.processor import Prompt
from llavakit.types import Completion, Conversation, SamplingParams, TextPart
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene
from tests.tiny import IMAGE_TOKEN, save_llava


@functools.cache
def tiny_llm(dtype: str = "float32") -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        return LLM(save_llava(Path(folder) / "model"), dtype=dtype, device="cpu")  # type: ignore[arg-type]


def picture(seed: int) -> bytes:
    return to_png(render(draw_scene(random.Random(seed)), 40, 30))


CONVERSATIONS = (
    Conversation.ask("what is in the picture?", picture(1)),
    Conversation.ask("is there a green star?"),
    Conversation.ask("two pictures, one word:", picture(2), picture(3)),
    Conversation.ask("a red circle", picture(4)).reply("two blue squares", TextPart("and now?")),
)
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


def settings(**changes: Any) -> EngineSettings:
    return replace(EngineSettings(num_blocks=64), **changes)


def request(conversation: Conversation = CONVERSATIONS[0], params: SamplingParams = LONG, **terms: Any) -> Request:
    llm = tiny_llm()
    own = Terms(context_len=256, end_ids=llm.requests.end_ids, tokenizer=llm.processor.tokenizer, **terms)
    return Request(llm.processor.prompt(conversation), params, own)


def answers(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Run requests together, the scheduler's invariants checked after each step."""
    numbers = [engine.add(one) for one in requests]
    found = {event.request: event.completion for event in checked(engine) if event.completion is not None}
    return [found[number] for number in numbers]


def checked(engine: Engine) -> Iterator[TokenEvent]:
    while engine.has_work:
        yield from engine.step()
        engine.scheduler.check_integrity()


def recompute(prompt: Prompt, steps: int) -> tuple[list[int], Tensor]:
    """Decode greedily without a cache, the whole sequence again for every token; and the log probabilities at each."""
    llm = tiny_llm()
    core = llm.core
    assert isinstance(core, LlavaCore)
    ids, rows = list(prompt.ids), []
    with torch.no_grad():
        features = core.encode_images(prompt.tiles_N3SS, prompt.grids) if prompt.grids else None
        for _ in range(steps):
            x_TD = core.embed(torch.tensor(ids), features)
            h_TD = core.forward_packed(x_TD, torch.arange(len(ids)), Packed(torch.tensor([0, len(ids)])))
            rows.append(core.logits(h_TD[-1:])[0, : len(llm.processor.tokenizer)])
            ids.append(int(rows[-1].argmax()))
    return ids[len(prompt.ids) :], torch.stack(rows).log_softmax(-1)


@functools.cache
def alone(index: int, dtype: str = "float32") -> tuple[int, ...]:
    return tiny_llm(dtype).chat(CONVERSATIONS[index], LONG).ids


@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
def test_greedy_decoding_equals_recomputation(index: int) -> None:
    assert list(alone(index)) == recompute(tiny_llm().processor.prompt(CONVERSATIONS[index]), 24)[0]


@pytest.mark.catalogue("G9")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_batch_get_the_ids_they_get_alone(dtype: str) -> None:
    together = tiny_llm(dtype).chat(CONVERSATIONS * 3, LONG)
    assert [completion.ids for completion in together] == [alone(index, dtype) for index in range(4)] * 3


@pytest.mark.parametrize(
    "changes", [{"step_tokens": 1}, {"step_tokens": 7}, {"max_batch": 2}, {"prefix_cache": 0}, {"lookup_tokens": 5}], ids=str
)
def test_no_setting_changes_an_answer(changes: dict[str, int]) -> None:
    found = answers(Engine(tiny_llm().core, settings(**changes)), [request(conversation) for conversation in CONVERSATIONS * 2])
    assert [completion.ids for completion in found] == [alone(index) for index in range(4)] * 2


@pytest.mark.catalogue("E10", "E12")
def test_preemption_changes_no_answer() -> None:
    params = replace(LONG, max_tokens=90)
    engine = Engine(tiny_llm().core, settings(num_blocks=12))
    found = answers(engine, [request(conversation, params) for conversation in CONVERSATIONS * 2])
    assert engine.stats().num_preempted > 0
    assert [completion.ids for completion in found] == [tiny_llm().chat(conversation, params).ids for conversation in CONVERSATIONS * 2]


@pytest.mark.catalogue("E5", "G6", "G8")
def test_what_comes_and_goes_changes_no_answer() -> None:
    engine = Engine(tiny_llm().core, settings())
    first = engine.add(request(CONVERSATIONS[2]))
    for _ in range(5):
        engine.step()
    second, other = engine.add(request(CONVERSATIONS[0])), engine.add(request(CONVERSATIONS[3]))
    for _ in range(4):
        engine.step()
    engine.abort(other)
    found = {event.request: event.completion for event in checked(engine) if event.completion is not None}
    assert (found[first].ids, found[second].ids) == (alone(2), alone(0))
    assert found[other].finish_reason == "abort"
    assert found[other].ids == alone(3)[:4]
    engine.abort(first)  # it is over: nothing happens


@pytest.mark.catalogue("A29", "G7")
def test_a_second_question_about_a_picture_finds_its_features_and_its_cache() -> None:
    engine = Engine(tiny_llm().core, settings())
    answers(engine, [request(Conversation.ask("what is there? " * 3, picture(1)))])
    before = engine.stats()
    (found,) = answers(engine, [request(Conversation.ask("what is there? " * 2 + "a red circle?", picture(1)))])
    after = engine.stats()
    assert after.num_found_tokens - before.num_found_tokens >= 32
    assert after.num_encoded_pictures == before.num_encoded_pictures == 1
    fresh = Engine(tiny_llm().core, settings(prefix_cache=0))
    assert answers(fresh, [request(Conversation.ask("what is there? " * 2 + "a red circle?", picture(1)))])[0].ids == found.ids


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    engine = Engine(tiny_llm().core, settings())
    found = answers(engine, [request(CONVERSATIONS[2]) for _ in range(4)])
    assert {completion.ids for completion in found} == {alone(2)}
    assert engine.stats().num_encoded_pictures == 2
    assert engine.stats().num_found_tokens >= 3 * 32


@pytest.mark.catalogue("G2", "G3", "G5", "A29")
@pytest.mark.parametrize("difference", ["picture", "tenant"])
def test_nothing_is_shared_where_something_differs(difference: str) -> None:
    engine = Engine(tiny_llm().core, settings())
    one = request(Conversation.ask("what is there? " * 4, picture(1)))
    other = request(Conversation.ask("what is there? " * 4, picture(2 if difference == "picture" else 1)))
    if difference == "tenant":
        other.terms = replace(other.terms, tenant="another")
    answers(engine, [one])
    found = engine.stats().num_found_tokens
    answers(engine, [other])
    picture_start = one.prompt.ids.index(IMAGE_TOKEN)
    assert engine.stats().num_found_tokens - found <= picture_start


def test_log_probabilities_are_those_of_a_plain_forward() -> None:
    params = replace(LONG, logprobs=3, prompt_logprobs=0)
    (found,) = answers(Engine(tiny_llm().core, settings(step_tokens=9)), [request(CONVERSATIONS[0], params)])
    _, expected = recompute(tiny_llm().processor.prompt(CONVERSATIONS[0]), 24)
    assert found.logprobs is not None
    assert [entry.token for entry in found.logprobs] == list(found.ids)
    for entry, row in zip(found.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([logprob for _, logprob in entry.top]), best.values, atol=1e-4, rtol=0)


def test_log_probabilities_of_the_prompt_are_those_of_a_plain_forward_even_where_it_is_cached() -> None:
    llm = tiny_llm()
    engine = Engine(llm.core, settings(step_tokens=9))
    params = replace(LONG, max_tokens=1, prompt_logprobs=0)
    prompt = llm.processor.prompt(CONVERSATIONS[1])
    core, ids = llm.core, torch.tensor(prompt.ids)
    with torch.no_grad():
        h_TD = core.forward_packed(core.embed(ids, None), torch.arange(len(ids)), Packed(torch.tensor([0, len(ids)])))  # type: ignore[call-arg]
        logprobs_TV = core.logits(h_TD)[:, : len(llm.processor.tokenizer)].log_softmax(-1)
    expected = logprobs_TV[:-1].gather(1, ids[1:, None])[:, 0]
    for _ in range(2):
        (found,) = answers(engine, [request(CONVERSATIONS[1], params)])
        assert found.prompt_logprobs is not None
        torch.testing.assert_close(torch.tensor([entry.logprob for entry in found.prompt_logprobs]), expected, atol=1e-4, rtol=0)


def test_draws_of_one_request_share_its_prompt_and_are_those_of_single_requests() -> None:
    params = SamplingParams(max_tokens=12, temperature=5.0, seed=3, ignore_eos=True, n=3)
    engine = Engine(tiny_llm().core, settings())
    number = engine.add(request(CONVERSATIONS[2], params))
    found = {event.answer: event.completion for event in checked(engine) if event.completion is not None and event.request == number}
    singles = [answers(engine, [request(CONVERSATIONS[2], replace(params, n=1, seed=3 + draw))])[0] for draw in range(3)]
    assert [found[draw].ids for draw in range(3)] == [single.ids for single in singles]


def test_a_search_is_the_same_beside_others_and_when_memory_is_short() -> None:
    params = SamplingParams(max_tokens=10, num_beams=3, n=2)
    roomy, tight = Engine(tiny_llm().core, settings()), Engine(tiny_llm().core, settings(num_blocks=9, prefix_cache=0))
    (expected,) = answers(roomy, [request(CONVERSATIONS[0], params)])
    company = [request(conversation) for conversation in CONVERSATIONS]
    found = answers(tight, [*company, request(CONVERSATIONS[0], params), *(request(conversation) for conversation in CONVERSATIONS)])
    assert found[4] == expected
    assert [completion.ids for completion in found[:4]] == [alone(index) for index in range(4)]


@pytest.mark.catalogue("E16", "E17", "D13", "E18")
def test_a_request_that_fails_leaves_the_others_alone() -> None:
    def broken(ids: Tensor, scores: Tensor) -> Tensor:
        raise ValueError("a caller's own mistake")

    engine = Engine(tiny_llm().core, settings())
    good, bad, poisoned = request(), request(CONVERSATIONS[1], hooks=(broken,)), request(Conversation.ask("what?", picture(9)))
    poisoned.prompt.tiles_N3SS.fill_(torch.nan)
    numbers = [engine.add(one) for one in (good, bad, poisoned)]
    last = {event.request: event for event in checked(engine) if event.is_last}
    assert last[numbers[0]].completion.ids == alone(0)  # type: ignore[union-attr]
    assert isinstance(last[numbers[1]].error, ValueError)
    assert last[numbers[2]].error is not None
    assert last[numbers[2]].completion.finish_reason == "error"  # type: ignore[union-attr]
    # What was computed with it is not found by the next one.
    assert answers(engine, [request(CONVERSATIONS[3])])[0].ids == alone(3)
    assert engine.stats().num_used_blocks == 0


@pytest.mark.catalogue("E11")
def test_what_can_never_run_is_refused_at_once() -> None:
    engine = Engine(tiny_llm().core, settings(num_blocks=2))
    with pytest.raises(CapacityError, match=r"may fill \d+ blocks of 32 tokens and the cache has 2; lower max_tokens or n"):
        engine.add(request())
    prompt = Prompt((1, 5, 100_000), (False,) * 3, torch.empty(0, 3, 1, 1))
    with pytest.raises(PromptError, match="ids must lie in"):
        engine.add(Request(prompt, SamplingParams(max_tokens=1), Terms(context_len=64, end_ids=frozenset())))
    assert not engine.has_work


def test_guesses_are_right_where_text_repeats_itself() -> None:
    engine = Engine(tiny_llm().core, settings(lookup_tokens=6))
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    (found,) = answers(engine, [request(CONVERSATIONS[1], params)])
    assert found.ids == tiny_llm().chat(CONVERSATIONS[1], params).ids
    stats = engine.stats()
    assert stats.num_steps < 100 or stats.num_right_guesses == 0


def test_scores_of_given_answers_look_at_the_picture_once() -> None:
    llm = tiny_llm()
    before = llm.engine.stats()
    question = Conversation.ask("what colour is it? " * 2, picture(77))
    scored = llm.score(question, ["red", "a blue square", "two green stars"])
    assert sum(one.share for one in scored) == pytest.approx(1)
    after = llm.engine.stats()
    assert after.num_encoded_pictures - before.num_encoded_pictures == 1
    assert after.num_found_tokens - before.num_found_tokens >= 2 * 32
    for one in scored:
        prompt = llm.processor.answered(question.reply(one.text), llm.processor.prompt(question))
        (whole,) = answers(
            Engine(llm.core, settings()),
            [
                Request(
                    prompt,
                    replace(LONG, max_tokens=1, prompt_logprobs=0),
                    Terms(context_len=256, end_ids=frozenset(), tokenizer=llm.processor.tokenizer),
                )
            ],
        )
        assert whole.prompt_logprobs is not None
        learned = [entry.logprob for entry, is_learned in zip(whole.prompt_logprobs, prompt.loss_mask[1:], strict=True) if is_learned]
        assert one.logprob == pytest.approx(sum(learned), abs=1e-4)
        assert len(one.tokens) == len(learned)


def test_threads_that_ask_one_llm_get_their_own_answers() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: tiny_llm().chat(CONVERSATIONS[index % 4], LONG).ids, range(12)))
    assert found == [alone(index % 4) for index in range(12)]


def test_a_stream_that_nobody_reads_to_its_end_is_aborted() -> None:
    llm = tiny_llm()
    stream = llm.stream(CONVERSATIONS[0], LONG)
    list(itertools.islice(stream, 3))
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.stats().num_running == llm.engine.stats().num_waiting == 0
    assert llm.chat(CONVERSATIONS[0], LONG).ids == alone(0)


def test_one_of_many_that_cannot_be_answered_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    found = tiny_llm().chat([CONVERSATIONS[0], Conversation.ask("circle " * 400), Conversation.ask("what?", b"no picture")], LONG)
    assert found[0].ids == alone(0)
    assert [completion.finish_reason for completion in found] == ["length", "error", "error"]
    assert "255" in (found[1].error or "")
    assert "request 1 cannot be answered" in caplog.text


def test_streamed_text_joins_to_the_completion() -> None:
    events = list(tiny_llm().stream(CONVERSATIONS[0], LONG))
    completion = events[-1].completion
    assert completion is not None
    assert "".join(event.text for event in events) == completion.text
    assert tuple(event.token for event in events) == completion.ids
    assert [event.completion for event in events[:-1]] == [None] * (len(events) - 1)


def test_a_stop_string_ends_the_answer_before_it() -> None:
    whole = tiny_llm().chat(CONVERSATIONS[0], LONG).text
    stop = whole[5:8]
    found = tiny_llm().chat(CONVERSATIONS[0], replace(LONG, stop=(stop,)))
    assert found.finish_reason == "stop"
    assert found.text == whole[: whole.index(stop)]


def test_a_stop_token_ends_the_answer() -> None:
    ids = alone(0)
    found = tiny_llm().chat(CONVERSATIONS[0], replace(LONG, stop_token_ids=(ids[4],)))
    assert found.finish_reason == "stop"
    assert found.ids == ids[: ids.index(ids[4]) + 1]


def test_sampled_rows_depend_on_their_seed_alone() -> None:
    params = SamplingParams(max_tokens=12, temperature=20.0, seed=3, ignore_eos=True)
    single = tiny_llm().chat(CONVERSATIONS[1], params).ids
    together = tiny_llm().chat([CONVERSATIONS[0], CONVERSATIONS[1]], params)
    assert together[1].ids == single
    assert tiny_llm().chat(CONVERSATIONS[1], replace(params, seed=4)).ids != single


def test_penalties_and_biases_move_the_scores() -> None:
    favourite = alone(1)[0]
    banned = tiny_llm().chat(CONVERSATIONS[1], replace(LONG, logit_bias={favourite: -100.0}))
    assert favourite not in banned.ids
    repeating = tiny_llm().chat(CONVERSATIONS[1], replace(LONG, presence_penalty=-100.0))
    assert set(repeating.ids) == {favourite}
    varied = tiny_llm().chat(CONVERSATIONS[1], replace(LONG, frequency_penalty=100.0))
    assert len(set(varied.ids)) == len(varied.ids)


def test_usage_counts_image_tokens() -> None:
    usage = tiny_llm().chat(CONVERSATIONS[2], LONG).usage
    assert usage.completion_tokens == 24
    assert usage.prompt_tokens == len(tiny_llm().processor.prompt(CONVERSATIONS[2]).ids)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(PromptError, match="255"):
        tiny_llm().chat(Conversation.ask("circle " * 400))


def test_an_answer_ends_with_the_context() -> None:
    completion = tiny_llm().chat(CONVERSATIONS[0], SamplingParams(ignore_eos=True))
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens == 256
    assert completion.finish_reason == "length"


def test_texts_and_ids_are_continued_without_a_template() -> None:
    llm = tiny_llm()
    text = llm.generate("is there a green star?", LONG)
    ids = [llm.processor.tokenizer.bos_token_id or 0, *llm.processor.tokenizer.encode_text("is there a green star?")]
    assert text.ids == llm.generate([ids], LONG)[0].ids == tuple(recompute(llm.requests.text(ids).prompt, 24)[0])
    assert [event.token for event in llm.stream_text("is there a green star?", LONG)] == list(text.ids)
