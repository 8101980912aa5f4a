"""Mixed requests in any company: ids and the bits of all scores are those that each request gets alone.

40 requests always, 2,000 in the soak: with and without pictures, greedy and drawn, one answer or two, arriving at random between steps, in
batches of 1, 2, 8 and 32, chunks and memory of any size, with and without cache and guesses, others coming and being aborted.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from torch import Tensor

from benchmarks.harness import write_result
from llavakit.engine.engine import Engine, EngineSettings
from llavakit.engine.request import Request, Terms, TokenEvent
from llavakit.types import Conversation, SamplingParams, TextPart
from tests.unit.engine.test_engine import picture, tiny_llm

WORDS = ("what", "is", "there", "a", "red", "circle", "two", "blue", "squares", "left", "of", "the", "star", "?")
BATCHES = (1, 2, 8, 32)


@dataclass(frozen=True)
class Case:
    """What is asked; a request is made of it anew for every run."""

    conversation: Conversation
    params: SamplingParams


def draw_cases(count: int, seed: int) -> list[Case]:
    chance = random.Random(seed)
    pictures = [picture(index) for index in range(12)]
    cases = []
    for number in range(count):
        text = " ".join(chance.choice(WORDS) for _ in range(chance.choice((1, 3, 8, 12))))
        conversation = Conversation.ask(text, *chance.choices(pictures, k=chance.choice((0, 0, 1, 1, 2))))
        if chance.random() < 0.2:
            conversation = conversation.reply("two squares", TextPart("and now?"))
        drawn = chance.random() < 0.3
        params = SamplingParams(
            max_tokens=chance.choice((1, 4, 12, 40)),
            temperature=3.0 if drawn else 0.0,
            seed=number,
            n=chance.choice((1, 2)) if drawn else 1,
            repetition_penalty=chance.choice((1.0, 1.0, 1.3)),
            frequency_penalty=chance.choice((0.0, 0.0, 0.5)),
            ignore_eos=chance.random() < 0.5,
        )
        cases.append(Case(conversation, params))
    return cases


class Recorded:
    """A request whose scores are summed up as they come, answer by answer, and what it got."""

    def __init__(self, case: Case, dtype: str) -> None:
        llm = tiny_llm(dtype)
        self.sums: Counter[bytes] = Counter()
        self.answers: dict[int, tuple[object, ...]] = {}
        prompt = llm.processor.prompt(case.conversation)
        terms = Terms(context_len=256, end_ids=llm.requests.end_ids, tokenizer=llm.processor.tokenizer, hooks=(self._note,))
        self.request = Request(prompt, case.params, terms)

    def _note(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.sums[hashlib.sha256(ids.numpy().tobytes() + scores.float().numpy().tobytes()).digest()] += 1
        return scores

    def hear(self, event: TokenEvent) -> None:
        if (found := event.completion) is not None:
            self.answers[event.answer] = (found.ids, found.text, found.finish_reason)

    def result(self) -> tuple[object, ...]:
        assert len(self.answers) == self.request.params.n
        return self.sums, self.answers


def alone(cases: Sequence[Case], dtype: str) -> list[tuple[object, ...]]:
    """Answer each in an engine of its own."""
    results = []
    for case in cases:
        recorded = Recorded(case, dtype)
        engine = Engine(tiny_llm(dtype).core, EngineSettings(num_blocks=16, max_batch=2, prefix_cache=False))
        engine.add(recorded.request)
        for event in engine.run():
            recorded.hear(event)
        results.append(recorded.result())
    return results


def in_company(cases: Sequence[Case], dtype: str, batch: int, seed: int) -> tuple[list[tuple[object, ...]], Engine]:
    """Answer all in one engine, in which others come and go."""
    chance = random.Random(seed)
    settings = EngineSettings(
        num_blocks=max(16, chance.choice((1, 2, 40)) * batch),
        max_batch=batch,
        step_tokens=chance.choice((3, 17, 64, 512)),
        prefix_cache=chance.random() < 0.7,
        lookup_tokens=0,
        feature_bytes=chance.choice((0, 4096, 1 << 20)),
    )
    engine = Engine(tiny_llm(dtype).core, settings)
    waiting = [Recorded(case, dtype) for case in cases]
    recorded = list(waiting)
    running: dict[int, Recorded] = {}
    passing: list[int] = []
    while waiting or engine.has_work:
        while waiting and (len(engine._tasks) < 2 * batch) and chance.random() < 0.7:
            one = waiting.pop(0)
            running[engine.add(one.request)] = one
            if chance.random() < 0.1:
                passing.append(engine.add(Recorded(chance.choice(cases), dtype).request))
        if passing and chance.random() < 0.2:
            engine.abort(passing.pop())
        for event in engine.step():
            if event.request in running:
                running[event.request].hear(event)
        engine.scheduler.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return [one.result() for one in recorded], engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_40_requests_get_the_same_bits_in_any_company(dtype: str) -> None:
    cases = draw_cases(40, seed=1)
    expected = alone(cases, dtype)
    for batch in (2, 32):
        found, _ = in_company(cases, dtype, batch, seed=batch)
        assert found == expected


@pytest.mark.soak
def test_2_000_requests_get_the_same_bits_in_any_company() -> None:
    start = time.perf_counter()
    differing, preempted, num_tokens, found_tokens = 0, 0, 0, 0
    for dtype in ("float32", "bfloat16"):
        cases = draw_cases(2000, seed=2)
        expected = alone(cases, dtype)
        for number, batch in enumerate(BATCHES * 2):
            found, engine = in_company(cases, dtype, batch, seed=100 + number)
            differing += sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
            stats = engine.stats()
            preempted, num_tokens = preempted + stats.num_preempted, num_tokens + stats.num_tokens
            found_tokens += stats.num_found_tokens
    facts = {"requests": 2000, "dtypes": ["float32", "bfloat16"], "batches": list(BATCHES), "runs": 2 * 2 * len(BATCHES)}
    counts = {"num_tokens": num_tokens, "num_preempted": preempted, "num_found_tokens": found_tokens, "differing": differing}
    write_result("engine_company", "make soak", {**facts, **counts, "seconds": round(time.perf_counter() - start, 1)})
    assert differing == 0
    assert preempted > 0
    assert found_tokens > 0
