"""The loop: every row gets the ids it gets alone, stops where it should, and shows its text once."""

import dataclasses
import functools
import random
import tempfile
from pathlib import Path

import pytest
import torch

from llavakit.engine.llm import LLM
from llavakit.engine.loop import run_requests
from llavakit.engine.request import Request, Terms
from llavakit.errors import PromptError
from llavakit.model.llava import LlavaCore
from llavakit.ops.attention import Packed
from llavakit.types import Conversation, SamplingParams, TextPart
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene
from tests.tiny import save_llava


@functools.cache
def tiny_llm() -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        return LLM.load(save_llava(Path(folder) / "model"), dtype="float32", device="cpu")


def picture(seed: int) -> bytes:
    return to_png(render(draw_scene(random.Random(seed)), 40, 30))


CONVERSATIONS = (
    Conversation.ask("what is in the picture?", picture(1)),
    Conversation.ask("is there a green star?"),
    Conversation.ask("two pictures, one word:", picture(2), picture(3)),
    Conversation.ask("a red circle", picture(4)).reply("two blue squares", TextPart("and now?")),
)
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


def recompute(conversation: Conversation, steps: int) -> list[int]:
    """Decode greedily without a cache: the whole sequence again for every token."""
    llm = tiny_llm()
    core = llm.core
    assert isinstance(core, LlavaCore)
    prompt = llm.processor.prompt(conversation)
    ids = list(prompt.ids)
    with torch.no_grad():
        features = core.encode_images(prompt.tiles_N3SS) if prompt.grids else None
        for _ in range(steps):
            x_TD = core.embed(torch.tensor(ids), features)
            h_TD = core.forward_packed(x_TD, torch.arange(len(ids)), Packed(torch.tensor([0, len(ids)])))
            ids.append(int(core.logits(h_TD[-1:])[:, : len(llm.processor.tokenizer)].argmax()))
    return ids[len(prompt.ids) :]


@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
def test_cached_decoding_equals_recomputation(index: int) -> None:
    found = tiny_llm().chat(CONVERSATIONS[index], LONG)
    assert list(found.ids) == recompute(CONVERSATIONS[index], 24)


def test_rows_of_a_batch_get_the_ids_they_get_alone() -> None:
    alone = [tiny_llm().chat(conversation, LONG).ids for conversation in CONVERSATIONS]
    together = tiny_llm().chat(CONVERSATIONS * 3, LONG)
    assert [completion.ids for completion in together] == alone * 3


def test_rows_that_end_early_leave_the_others_unchanged() -> None:
    alone = [tiny_llm().chat(conversation, LONG).ids for conversation in CONVERSATIONS]
    llm = tiny_llm()
    requests = [
        Request(
            llm.processor.prompt(conversation),
            dataclasses.replace(LONG, max_tokens=3 + 5 * row),
            Terms(context_len=256, end_ids=frozenset(), tokenizer=llm.processor.tokenizer),
        )
        for row, conversation in enumerate(CONVERSATIONS)
    ]
    for _ in run_requests(llm.core, requests):
        pass
    assert [tuple(request.ids) for request in requests] == [ids[: 3 + 5 * row] for row, ids in enumerate(alone)]
    assert {request.finish_reason for request in requests} == {"length"}


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
    found = tiny_llm().chat(CONVERSATIONS[0], dataclasses.replace(LONG, stop=(stop,)))
    assert found.finish_reason == "stop"
    assert found.text == whole[: whole.index(stop)]


def test_a_stop_token_ends_the_answer() -> None:
    ids = tiny_llm().chat(CONVERSATIONS[0], LONG).ids
    found = tiny_llm().chat(CONVERSATIONS[0], dataclasses.replace(LONG, stop_token_ids=(ids[4],)))
    assert found.finish_reason == "stop"
    assert found.ids == ids[: ids.index(ids[4]) + 1]


def test_sampled_rows_depend_on_their_seed_alone() -> None:
    params = SamplingParams(max_tokens=12, temperature=20.0, seed=3, ignore_eos=True)
    alone = tiny_llm().chat(CONVERSATIONS[1], params).ids
    together = tiny_llm().chat([CONVERSATIONS[0], CONVERSATIONS[1]], params)
    assert together[1].ids == alone
    assert tiny_llm().chat(CONVERSATIONS[1], dataclasses.replace(params, seed=4)).ids != alone


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
