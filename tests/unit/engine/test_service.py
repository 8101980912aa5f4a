"""The engine's thread: what coroutines submit they get, whatever is cancelled, refused, drained or broken beside them."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from llavakit.engine.llm import LLM
from llavakit.engine.request import Request
from llavakit.engine.service import AsyncEngine
from llavakit.errors import CapacityError, ConfigError, PromptError
from llavakit.types import Conversation, SamplingParams
from tests.unit.engine.test_engine import CONVERSATIONS, LONG, alone, tiny_llm


def served(body: Callable[[AsyncEngine], Coroutine[Any, Any, None]], **options: Any) -> AsyncEngine:
    """Run a coroutine with an engine of its own over the tiny model."""
    engine = AsyncEngine(LLM.of(tiny_llm().core, tiny_llm().processor, max_batch=8), **options)

    async def whole() -> None:
        try:
            await asyncio.wait_for(body(engine), 60)
        finally:
            await engine.close()

    asyncio.run(whole())
    assert not engine.is_healthy
    assert engine.stats().num_used_blocks == 0
    return engine


def chat(engine: AsyncEngine, index: int, params: SamplingParams = LONG) -> Callable[[], Request]:
    return functools.partial(engine.requests.chat, CONVERSATIONS[index % 4], params)


def test_many_coroutines_get_their_own_answers() -> None:
    async def body(engine: AsyncEngine) -> None:
        completions = await asyncio.gather(*(engine.complete(chat(engine, index)) for index in range(20)))
        assert [completion.ids for completion in completions] == [alone(index % 4) for index in range(20)]

    served(body)


def test_a_stream_shows_tokens_as_they_come() -> None:
    async def body(engine: AsyncEngine) -> None:
        events = [event async for event in engine.stream(chat(engine, 0))]
        assert tuple(event.token for event in events) == alone(0)
        assert [event.is_last for event in events] == [False] * (len(events) - 1) + [True]

    served(body)


def test_leaving_or_cancelling_ends_the_request_and_no_other() -> None:
    async def body(engine: AsyncEngine) -> None:
        endless = SamplingParams(max_tokens=150, ignore_eos=True)
        async with await engine.submit(chat(engine, 1, endless)) as left:
            await anext(left)
        cancelled = asyncio.create_task(engine.complete(chat(engine, 2, endless)))
        good = asyncio.create_task(engine.complete(chat(engine, 3)))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        assert (await good).ids == alone(3)
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await engine.drain()
        assert engine.stats().num_running == engine.stats().num_waiting == 0

    served(body)


def test_an_aborted_request_says_so() -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = await engine.submit(chat(engine, 0, SamplingParams(max_tokens=150, ignore_eos=True)))
        await anext(stream)
        stream.abort()
        completion = await stream.completion()
        assert completion.finish_reason == "abort"
        assert 0 < len(completion.ids) < 150

    served(body)


def test_bad_requests_raise_where_they_were_made() -> None:
    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(PromptError, match="at most 255 fit"):
            await engine.submit(functools.partial(engine.requests.chat, Conversation.ask("circle " * 400)))
        with pytest.raises(PromptError, match="there is no adapter 'x'; loaded are none"):
            await engine.submit(functools.partial(engine.requests.chat, CONVERSATIONS[1], LONG, adapter="x"))
        with pytest.raises(ConfigError, match="there is no adapter 'x'"):
            await engine.drop_adapter("x")
        assert (await engine.complete(chat(engine, 1))).ids == alone(1)

    served(body)


def test_too_many_are_refused_and_the_rest_answered() -> None:
    async def body(engine: AsyncEngine) -> None:
        found = await asyncio.gather(*(engine.complete(chat(engine, index)) for index in range(12)), return_exceptions=True)
        refused = [one for one in found if isinstance(one, CapacityError)]
        assert refused
        assert "wait already" in str(refused[0])
        assert next(one.ids for one in found if not isinstance(one, BaseException)) == alone(0)

    served(body, max_waiting=3)


def test_drained_it_ends_what_it_has_and_takes_no_more() -> None:
    async def body(engine: AsyncEngine) -> None:
        running = [await engine.submit(chat(engine, index)) for index in range(4)]
        await engine.drain()
        assert [(await stream.completion()).ids for stream in running] == [alone(index) for index in range(4)]
        with pytest.raises(CapacityError, match="shutting down"):
            await engine.submit(chat(engine, 0))

    served(body)


def test_closed_it_leaves_nobody_waiting() -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = await engine.submit(chat(engine, 0, SamplingParams(max_tokens=150, ignore_eos=True)))
        await anext(stream)
        await engine.close()
        assert (await stream.completion()).finish_reason == "abort"
        with pytest.raises(CapacityError):
            await engine.load_adapter("x", "nowhere")

    served(body)


def test_a_step_that_fails_ends_its_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(engine: AsyncEngine) -> None:
        runner = engine.llm.engine.runner
        whole = runner.run

        def broken(inputs: Any) -> Any:
            monkeypatch.setattr(runner, "run", whole)
            raise RuntimeError("out of memory, say")

        monkeypatch.setattr(runner, "run", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            await engine.complete(chat(engine, 0))
        assert (await engine.complete(chat(engine, 0))).ids == alone(0)
        assert engine.is_healthy

    served(body)


def test_a_bug_in_the_engine_is_told_to_everybody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def body(engine: AsyncEngine) -> None:
        def broken() -> Any:
            raise AssertionError("a block is lost")

        monkeypatch.setattr(engine.llm.engine.scheduler, "step", broken)
        with pytest.raises(AssertionError, match="a block is lost"):
            await engine.complete(chat(engine, 0))
        with pytest.raises(CapacityError, match="the engine has stopped: a block is lost"):
            await engine.submit(chat(engine, 0))
        for task in list(engine.llm.engine._tasks.values()):
            engine.llm.engine._forget(task)

    served(body)
    assert "the engine has stopped" in caplog.text
