"""Replicas of a model on Ray Serve, behind the same server.

Owns: Replica (what runs there), ClusterBackend (what the server asks), start_cluster. The server, its
limits and its pictures stay in one process; replicas only compute. Ray restarts a replica that is unhealthy or gone.
Invariants: a question whose replica is gone before its first token is asked again elsewhere; after it the answer ends in an error; what
is wrong with a question comes back as a value, so that no text of a remote traceback is ever shown.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, Self

from llavakit.engine.engine import Stats
from llavakit.engine.llm import LLM
from llavakit.engine.request import TokenEvent
from llavakit.errors import BusyError, ConfigError, LlavaError
from llavakit.logs import logger
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.server.backend import LocalBackend, Question
from llavakit.server.config import ClusterConfig, ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.routing import routing_key

__all__ = ["ClusterBackend", "Remote", "Replica", "start_cluster"]

_LOG = logger("server")
_MOST_TRIES = 4
_PING_S = 15.0
_COUNT_S = 2.0
_NAME = "llavakit"
_ROUTER = "llavakit.server.ray_router:PrefixRouter"


class Remote(Protocol):
    """Events from a replica, and how to end them."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def __anext__(self) -> TokenEvent: ...

    def cancel(self) -> object:
        """End the answer there."""
        ...


class Replica:
    """A model that answers whoever asks, one of several."""

    def __init__(self, load: Callable[[], LLM], config: ServerConfig) -> None:
        """Load the model."""
        self._backend = LocalBackend(load(), config)

    async def answer(self, question: Question, key: str) -> AsyncIterator[TokenEvent]:
        """Yield a question's events; what is wrong with it is the error of the last one. key is for whoever routes."""
        del key
        try:
            async with await self._backend.submit(question) as stream:
                async for event in stream:
                    yield event
        except LlavaError as error:
            yield TokenEvent(-1, None, "", is_last=True, error=error)

    async def check_health(self) -> None:
        """Raise where the engine does not compute."""
        if not await self._backend.is_healthy():
            raise RuntimeError("the engine does not compute")

    async def ping(self) -> None:
        """Answer."""

    async def stats(self) -> Stats:
        """Count."""
        return self._backend.engine.stats()

    async def facts(self) -> dict[str, Any]:
        """Return what the server must know of the model."""
        backend = self._backend
        return {
            "processor": backend.processor,
            "context_len": backend.context_len,
            "max_batch": backend.max_batch,
            "adapters": backend.adapters,
        }


class ClusterBackend:
    """Replicas, asked through a function."""

    def __init__(
        self,
        ask: Callable[[Question, str], Remote],
        ping: Callable[[], Awaitable[object]],
        count: Callable[[], Awaitable[Sequence[object]]],
        leave: Callable[[], object],
        *,
        lost: tuple[type[Exception], ...],
        processor: LlavaProcessor | TextProcessor,
        context_len: int,
        max_batch: int,
        adapters: tuple[str, ...],
    ) -> None:
        """Ask gives a question to a replica; lost are the errors that mean that a replica is gone or took nothing.

        Count returns each replica's Stats, or what else came in their place.
        """
        self._ask, self._ping, self._count, self._leave, self._lost = ask, ping, count, leave, lost
        self.processor, self.context_len, self.max_batch, self._adapters = processor, context_len, max_batch, adapters
        self._open: set[_Asked] = set()
        self._is_draining = False

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return self._adapters

    async def submit(self, question: Question) -> _Asked:
        """Ask. Raises: BusyError once the server drains."""
        if self._is_draining:
            raise BusyError("the server is shutting down and accepts nothing more")
        asked = _Asked(self._ask, question, self._lost, self._open.discard)
        self._open.add(asked)
        return asked

    def is_queued(self, answering: Any) -> bool:
        """Tell whether a question has no token yet."""
        return not answering.has_begun

    async def stats(self) -> Sequence[Stats]:
        """Ask all replicas; nobody's counts are known where one of them does not answer in time."""
        try:
            async with asyncio.timeout(_COUNT_S):
                return [found for found in await self._count() if isinstance(found, Stats)]
        except TimeoutError:
            return []
        except self._lost:
            return []

    async def is_healthy(self) -> bool:
        """Tell whether some replica answers."""
        try:
            async with asyncio.timeout(_PING_S):
                await self._ping()
        except TimeoutError:
            return False
        except self._lost:
            return False
        return True

    async def drain(self) -> None:
        """Take no more questions, and wait for the answers."""
        self._is_draining = True
        while self._open:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Let go of the replicas."""
        await asyncio.to_thread(self._leave)


class _Asked:
    """A question on its way; asked again where its replica is gone before it said anything."""

    def __init__(
        self,
        ask: Callable[[Question, str], Remote],
        question: Question,
        lost: tuple[type[Exception], ...],
        forget: Callable[[_Asked], object],
    ) -> None:
        self._lost, self._forget = lost, forget
        self._again: Callable[[], Remote] | None = functools.partial(ask, question, routing_key(question))
        """Asks again; None once the answer has begun, since the question keeps its pictures."""
        self._tries = itertools.count(1)
        self._events = self._again()
        self._is_over = False

    @property
    def has_begun(self) -> bool:
        """Whether a token has come."""
        return self._again is None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        """Return the next event. Raises: what is wrong with the question; HttpError (503) where its replica is gone."""
        if self._is_over:
            raise StopAsyncIteration
        while True:
            try:
                event = await anext(self._events)
            except self._lost as error:
                if self._again is None or next(self._tries) >= _MOST_TRIES:
                    raise HttpError(503, "replica_lost", "what answered is gone; ask again", retry_s=1) from error
                _LOG.warning("a replica is gone; its question is asked again")
                await asyncio.sleep(0.2)
                self._events = self._again()
                continue
            self._again = None
            self._is_over = event.is_last
            if event.error is not None:
                try:
                    raise event.error
                finally:
                    del event  # the error knows this frame
            return event

    def abort(self) -> None:
        """End the answer."""
        if not self._is_over:
            self._is_over = True
            self._events.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.abort()
        self._forget(self)


def start_cluster(load: Callable[[], LLM], config: ServerConfig, cluster: ClusterConfig) -> ClusterBackend:
    """Start the replicas on Ray Serve, and wait for the first ones. Raises: ConfigError without Ray."""
    try:
        import ray
        from ray import serve
        from ray.serve.config import RequestRouterConfig
        from ray.serve.exceptions import RayServeException
    except ImportError as error:
        raise ConfigError("replicas need Ray: pip install 'llavakit[ray]'") from error

    ray.init(cluster.ray_address, include_dashboard=False, log_to_driver=False, configure_logging=False, namespace=_NAME)
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(
        name=_NAME,
        max_ongoing_requests=64,
        autoscaling_config={
            "min_replicas": cluster.replicas,
            "initial_replicas": cluster.replicas,
            "max_replicas": cluster.most_replicas,
            "target_ongoing_requests": 16,
        },
        health_check_period_s=5,
        health_check_timeout_s=_PING_S,
        graceful_shutdown_timeout_s=config.drain_s,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        ray_actor_options={"num_cpus": cluster.replica_cpus, "num_gpus": cluster.replica_gpus},
    )(Replica)
    handle = serve.run(deployment.bind(load, config), name=_NAME, route_prefix=None)
    facts = handle.facts.remote().result(timeout_s=600)
    streaming = handle.options(stream=True)

    def leave() -> None:
        serve.shutdown()
        ray.shutdown()

    return ClusterBackend(
        streaming.answer.remote,
        lambda: handle.ping.remote(),
        lambda: handle.broadcast("stats").results_async(return_exceptions=True),
        leave,
        lost=(ray.exceptions.RayActorError, RayServeException),
        processor=facts["processor"],
        context_len=facts["context_len"],
        max_batch=facts["max_batch"] * cluster.most_replicas,
        adapters=facts["adapters"],
    )
