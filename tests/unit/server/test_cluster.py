"""Replicas without Ray: who is asked first, what happens when one is gone, and batches that keep their rows."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from typing import Any

import pytest
from PIL import Image

from llavakit.engine.bulk import RowQuestions
from llavakit.engine.engine import Stats
from llavakit.engine.request import TokenEvent
from llavakit.errors import BusyError, ConfigError, PromptError
from llavakit.server.backend import Question
from llavakit.server.cluster import ClusterBackend, Replica
from llavakit.server.cluster_bulk import Answerer
from llavakit.server.config import ClusterConfig, ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.metrics import Metrics
from llavakit.server.routing import ranked, routing_key
from llavakit.types import Conversation, SamplingParams
from tests.serving import miniature
from tests.unit.engine.test_bulk import ROWS, llm, write

NAMES = [f"replica-{n}" for n in range(5)]
ASKED = Question(Conversation.ask("How many things are there?"), SamplingParams(max_tokens=6))


def test_keys_are_spread_and_stay_where_they_are() -> None:
    keys = [str(n) for n in range(2000)]
    first = {key: ranked(NAMES, key)[0] for key in keys}
    assert min(Counter(first.values()).values()) > 300
    assert {key: ranked(NAMES[::-1], key)[0] for key in keys} == first
    without = {key: ranked(NAMES[1:], key)[0] for key in keys}
    assert all(without[key] == first[key] for key in keys if first[key] != NAMES[0])
    assert sorted(ranked(NAMES, "x")) == NAMES


def test_questions_about_one_picture_go_to_one_place() -> None:
    def asked(text: str, color: str | None, tenant: str = "", adapter: str = "") -> str:
        images = () if color is None else (Image.new("RGB", (8, 8), color),)
        return routing_key(Question(Conversation.ask(text), SamplingParams(), images, tenant, adapter))

    assert asked("a", "red") == asked("b", "red")
    assert (
        len({asked("a", "red"), asked("a", "blue"), asked("a", None), asked("b", None), asked("a", "red", "t"), asked("a", "red", "", "x")})
        == 6
    )
    assert routing_key(Question("text", SamplingParams())) == routing_key(Question("text", SamplingParams(max_tokens=3)))
    assert routing_key(Question((1, 2), SamplingParams())) != routing_key(Question((1, 3), SamplingParams()))


class GoneError(Exception):
    """A replica is gone."""


class Events:
    """What a replica says until it is gone, as scripted."""

    def __init__(self, script: list[TokenEvent | Exception]) -> None:
        self.script, self.is_cancelled = list(script), False

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        await asyncio.sleep(0)
        if not self.script:
            raise StopAsyncIteration
        event = self.script.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.is_cancelled = True


def backend(
    scripts: list[list[TokenEvent | Exception]], ping: Callable[[], Any] | None = None, count: Callable[[], Any] | None = None
) -> tuple[ClusterBackend, list[Events]]:
    given: list[Events] = []

    def ask(question: Question, key: str) -> Events:
        assert key == routing_key(question)
        given.append(Events(scripts[min(len(given), len(scripts) - 1)]))
        return given[-1]

    async def fine() -> None:
        return None

    facts = {"processor": miniature().processor, "context_len": 1024, "max_batch": 8, "adapters": ("a",)}
    return ClusterBackend(ask, ping or fine, count or fine, lambda: None, lost=(GoneError,), **facts), given  # type: ignore[arg-type]


A, B = TokenEvent(0, 5, "a"), TokenEvent(0, 6, "b", is_last=True)


async def heard(cluster: ClusterBackend) -> list[TokenEvent]:
    async with await cluster.submit(ASKED) as answering:
        return [event async for event in answering]


def test_a_replica_that_is_gone_before_it_spoke_is_replaced() -> None:
    cluster, given = backend([[GoneError()], [GoneError()], [A, B]])
    assert asyncio.run(heard(cluster)) == [A, B]
    assert len(given) == 3


def test_a_replica_that_is_gone_while_it_speaks_ends_the_answer() -> None:
    cluster, given = backend([[A, GoneError()], [A, B]])
    with pytest.raises(HttpError, match="is gone; ask again") as found:
        asyncio.run(heard(cluster))
    assert (found.value.status, len(given)) == (503, 1)
    never, tried = backend([[GoneError()]])
    with pytest.raises(HttpError, match="is gone"):
        asyncio.run(heard(never))
    assert len(tried) == 4


def test_what_is_wrong_with_a_question_is_raised_and_leaving_cancels() -> None:
    cluster, _ = backend([[TokenEvent(-1, None, "", is_last=True, error=PromptError("too long"))]])
    with pytest.raises(PromptError, match="too long"):
        asyncio.run(heard(cluster))
    left, given = backend([[A, A, A, B]])

    async def leave() -> None:
        async with await left.submit(ASKED) as answering:
            assert left.is_queued(answering)
            await anext(aiter(answering))
            assert not left.is_queued(answering)
        assert given[0].is_cancelled
        await left.drain()
        with pytest.raises(BusyError):
            await left.submit(ASKED)

    asyncio.run(leave())


def test_health_is_that_of_some_replica() -> None:
    async def gone() -> None:
        raise GoneError

    assert asyncio.run(backend([[B]])[0].is_healthy())
    assert not asyncio.run(backend([[B]], gone)[0].is_healthy())


def test_counts_are_those_of_all_who_tell() -> None:
    def of(told: object) -> Any:
        async def count() -> Any:
            if isinstance(told, Exception):
                raise told
            return told

        return asyncio.run(backend([[B]], count=count)[0].stats())

    one = Stats(**{field.name: place for place, field in enumerate(fields(Stats))})
    assert of([one, GoneError(), one]) == [one, one]
    assert of([GoneError()]) == of([]) == of(GoneError()) == []
    told = Metrics().write([one, one]).decode()
    assert "llava_engines 2.0" in told
    assert f"llava_steps {2.0 * one.num_steps}" in told
    assert "llava_steps NaN" in Metrics().write([]).decode()


def test_a_replica_answers_as_the_engine_and_tells_errors_as_values() -> None:
    async def whole() -> None:
        replica = Replica(llm, ServerConfig(port=0))
        events = [event async for event in replica.answer(ASKED, "key")]
        assert (
            "".join(event.text for event in events) == miniature().chat(Conversation.ask("How many things are there?"), ASKED.params).text
        )
        (refused,) = [event async for event in replica.answer(Question("x", SamplingParams(), adapter="none"), "key")]
        assert refused.is_last
        assert isinstance(refused.error, PromptError)
        assert (await replica.facts())["context_len"] == miniature().requests.context_len
        assert (await replica.stats()).num_tokens == len([event for event in events if event.token is not None])
        await replica.check_health()
        await replica._backend.close()
        with pytest.raises(RuntimeError):
            await replica.check_health()

    asyncio.run(whole())


def test_batches_keep_their_rows(tmp_path: Any) -> None:
    questions = RowQuestions(write(tmp_path, [*ROWS, 7]), tmp_path)
    answerer = Answerer(llm, questions, ASKED.params, "")
    batch = answerer({"number": [5, 2, 0]})
    assert batch["number"] == [5, 2, 0]
    torn, _, counted = map(json.loads, batch["answer"])
    assert "error" in torn
    assert counted["finish_reason"] in ("stop", "length")


def test_numbers_of_replicas_are_checked() -> None:
    assert ClusterConfig(replicas=2).most_replicas == 2
    for wrong in ({"replicas": 0}, {"replicas": 3, "max_replicas": 2}, {"replica_cpus": 0.0}, {"replica_gpus": -1.0}):
        with pytest.raises(ConfigError):
            ClusterConfig(**wrong)
