"""The engine for an asyncio program: one thread steps it, coroutines submit requests and follow, abort and count them.

Owns: AsyncEngine and Stream. Refuses: HTTP, and what a server decides (who may ask, how long). The LLM that it is made of belongs to its
thread from then on.
Invariants: a submitted request ends exactly once, also when the engine is closed or fails; nothing that a coroutine does waits for a
step of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from llavakit.engine.engine import Stats
from llavakit.engine.llm import LLM, joined_answers
from llavakit.engine.request import Request, TokenEvent
from llavakit.errors import BusyError, CapacityError
from llavakit.logs import logger
from llavakit.ops.threads import end_team, one_thread
from llavakit.types import Completion

__all__ = ["AsyncEngine", "Stream"]

_LOG = logger("engine")
_T = TypeVar("_T")
_IDLE_S = 1.0


class Stream:
    """One request's events, as they come; leaving its context, or aclose, ends the request."""

    def __init__(self, engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        self.number = -1
        self._engine, self.loop = engine, loop
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._is_over = False

    def put(self, event: TokenEvent) -> None:
        """Take an event, on the stream's own loop."""
        self._events.put_nowait(event)

    def abort(self) -> None:
        """End the request; its last event still comes."""
        if not self._is_over:
            self._engine.abort(self.number)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        """Return the next event. Raises: what ended the request where that was an error."""
        if self._is_over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_over = event.is_last
        if event.error is not None:
            try:
                raise event.error
            finally:
                del event  # the error knows this frame
        return event

    async def completion(self) -> Completion:
        """Wait for the end and return the first answer, which holds the others. Raises: as __anext__."""
        return joined_answers([event async for event in self if event.completion is not None])

    async def aclose(self) -> None:
        """End the request where it is not over."""
        self.abort()
        self._is_over = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


class AsyncEngine:
    """An LLM's engine on a thread of its own."""

    def __init__(self, llm: LLM, *, max_waiting: int = 1024) -> None:
        """Start the thread. With max_waiting requests in the queue further ones are refused."""
        self.llm, self.requests, self.max_waiting = llm, llm.requests, max_waiting
        self._engine = llm.engine
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._streams: dict[int, Stream] = {}
        self._num_pending = 0
        self._guard = threading.Lock()
        self._is_draining = self._is_closed = self._is_over = False
        self._error: Exception | None = None
        self._num_threads = torch.get_num_threads()
        if llm.engine.runner.device.type == "cpu":
            end_team()  # the engine's thread has its own
        self._thread = threading.Thread(target=self._work, name="llavakit-engine", daemon=True)
        self._thread.start()

    async def submit(self, make: Callable[[], Request]) -> Stream:
        """Make a request on a worker thread, since that decodes pictures, and hand it to the engine.

        engine.submit(functools.partial(engine.requests.chat, conversation, params)), for instance.
        Raises: what make raises; BusyError while too many wait, and once the engine drains or has stopped.
        """
        self._check_open()
        self._num_pending += 1
        try:
            if self._engine.scheduler.num_waiting + self._num_pending > self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests wait already; try again later")
            request = await asyncio.to_thread(_made, make)
            self._check_open()
            stream = Stream(self, asyncio.get_running_loop())
            try:
                await self._call(lambda: self._add(request, stream))
            except asyncio.CancelledError:
                with contextlib.suppress(CapacityError):
                    self._post(lambda: self._drop(stream))
                raise
            return stream
        finally:
            self._num_pending -= 1

    async def stream(self, make: Callable[[], Request]) -> AsyncIterator[TokenEvent]:
        """Submit a request and yield its events; leaving the loop ends it."""
        async with await self.submit(make) as stream:
            async for event in stream:
                yield event

    async def complete(self, make: Callable[[], Request]) -> Completion:
        """Submit a request and wait for its answer; being cancelled ends it."""
        async with await self.submit(make) as stream:
            return await stream.completion()

    def abort(self, number: int) -> None:
        """End a request; its stream gets its last event."""
        with contextlib.suppress(CapacityError):  # a stopped engine has ended it
            self._post(lambda: self._engine.abort(number))

    async def load_adapter(self, name: str, source: str | Path, **options: Any) -> None:
        """Load a PEFT adapter between two steps. Raises: as LLM.load_adapter."""
        await self._call(lambda: self.llm.load_adapter(name, source, **options))

    async def drop_adapter(self, name: str) -> None:
        """Forget an adapter. Raises: ConfigError for one that is not there."""
        await self._call(lambda: self.llm.drop_adapter(name))

    def is_queued(self, stream: Stream) -> bool:
        """Tell whether a request waits for its first step, as of about now."""
        return self._engine.is_queued(stream.number)

    def stats(self) -> Stats:
        """Count, as of about now."""
        return self._engine.stats()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are accepted."""
        return self._error is None and not self._is_draining and self._thread.is_alive()

    async def drain(self) -> None:
        """Accept nothing more, and wait until everything accepted has ended."""
        self._is_draining = True
        while self._num_pending or self._streams or self._engine.has_work:
            if not self._thread.is_alive():
                return
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End all requests and the thread."""
        self._is_draining = self._is_closed = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    # On a coroutine's side

    def _check_open(self) -> None:
        if self._error is not None:
            raise BusyError(f"the engine has stopped: {self._error}") from self._error
        if self._is_draining:
            raise BusyError("the engine is shutting down and accepts nothing more")

    def _post(self, command: Callable[[], None]) -> None:
        with self._guard:
            if self._is_over:
                raise BusyError("the engine is closed")
            self._commands.append(command)
        self._wake.set()

    async def _call(self, command: Callable[[], _T]) -> _T:
        """Run a command on the engine's thread and wait for what it returns or raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def run() -> None:
            try:
                result = command()
            except Exception as error:
                _on(loop, _settle, future, None, error)
            else:
                _on(loop, _settle, future, result, None)

        self._post(run)
        return await future

    # On the engine's thread

    def _add(self, request: Request, stream: Stream) -> None:
        stream.number = self._engine.add(request)
        self._streams[stream.number] = stream

    def _drop(self, stream: Stream) -> None:
        if stream.number >= 0:
            self._engine.abort(stream.number)

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            while not self._is_closed:
                if not self._engine.has_work and not self._commands:
                    self._wake.wait(_IDLE_S)
                self._wake.clear()
                self._run_commands()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
            for number in list(self._streams):
                self._engine.abort(number)
            self._deliver(self._engine.step())
        except Exception as error:  # a bug of ours: nobody is left waiting, and nothing more is accepted
            _LOG.exception("the engine has stopped")
            self._error = error
        with self._guard:
            self._is_over = True
        self._run_commands()
        self._fail_all(self._error or BusyError("the engine was closed"))

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Hand a step's events over, with one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, TokenEvent]]] = defaultdict(list)
        for event in events:
            stream = self._streams.pop(event.request, None) if event.is_last else self._streams.get(event.request)
            if stream is not None:
                by_loop[stream.loop].append((stream, event))
        for loop, pairs in by_loop.items():
            _on(loop, _put_all, pairs)

    def _fail_all(self, error: Exception) -> None:
        self._deliver([TokenEvent(number, None, "", is_last=True, error=error) for number in list(self._streams)])


def _made(make: Callable[[], Request]) -> Request:
    with one_thread():  # a team for each of the worker threads would slow the engine's down
        return make()


def _on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Call on a loop, unless it is closed and nobody waits there any more."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _put_all(pairs: list[tuple[Stream, TokenEvent]]) -> None:
    for stream, event in pairs:
        stream.put(event)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
