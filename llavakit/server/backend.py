"""Who answers: an engine in this process, or replicas elsewhere, asked in the same words.

Owns: Question, Answering, Backend, and LocalBackend, the engine of this process.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from llavakit.engine.engine import Stats
from llavakit.engine.llm import LLM
from llavakit.engine.request import Request, TokenEvent
from llavakit.engine.service import AsyncEngine, Stream
from llavakit.errors import LlavaError
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.server.config import ServerConfig
from llavakit.types import Conversation, SamplingParams

__all__ = ["Answering", "Backend", "LocalBackend", "Question"]

_PROBE = SamplingParams(max_tokens=1)
_PROBE_S = 10.0
_PROBED_FOR_S = 2.0
"""How long a probe speaks for an idle engine."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked: a conversation with its pictures decoded, or a text or ids to go on from."""

    prompt: Conversation | str | tuple[int, ...]
    params: SamplingParams
    images: tuple[Image.Image, ...] = ()
    tenant: str = ""
    adapter: str = ""
    candidate: str | None = None
    """An answer whose log probabilities are wanted; nothing is generated then."""


class Answering(Protocol):
    """An answer on its way: its events, and how to end it."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    def abort(self) -> None:
        """End it."""
        ...

    async def __aenter__(self) -> Answering: ...

    async def __aexit__(self, *error: object) -> None: ...


class Backend(Protocol):
    """Answers questions."""

    processor: LlavaProcessor | TextProcessor
    context_len: int
    max_batch: int
    """Requests that run together, over all replicas."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        ...

    async def submit(self, question: Question) -> Answering:
        """Ask. Raises: PromptError and its kin, BusyError, CapacityError."""
        ...

    def is_queued(self, answering: Answering) -> bool:
        """Tell whether a question waits for its first step."""
        ...

    async def stats(self) -> Sequence[Stats]:
        """Count, for each engine that says something."""
        ...

    async def is_healthy(self) -> bool:
        """Tell whether questions are answered."""
        ...

    async def drain(self) -> None:
        """Take no more questions, and wait for the answers."""
        ...

    async def close(self) -> None:
        """End everything."""
        ...


class LocalBackend:
    """The engine of this process."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        """Start the engine's thread; the model belongs to it from here on."""
        self._llm, self._stall_s = llm, config.stall_s
        self.processor, self.context_len, self.max_batch = llm.processor, llm.requests.context_len, llm.engine.settings.max_batch
        self.engine = AsyncEngine(llm, max_waiting=self.max_batch + config.max_waiting)
        self._num_steps, self._stepped_at, self._probed_at = -1, time.monotonic(), float("-inf")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return self._llm.adapters

    async def submit(self, question: Question) -> Stream:
        """Ask; the request is made on a worker thread. Raises: PromptError and its kin, BusyError, CapacityError."""
        return await self.engine.submit(functools.partial(self._request, question))

    def is_queued(self, answering: Answering) -> bool:
        """Tell whether a question waits for its first step."""
        assert isinstance(answering, Stream)
        return self.engine.is_queued(answering)

    async def stats(self) -> Sequence[Stats]:
        """Count."""
        return [self.engine.stats()]

    async def is_healthy(self) -> bool:
        """Tell whether the engine computes: it made a step of late, or, where it has nothing to do, answers a probe."""
        if not self.engine.is_healthy:
            return False
        stats, now = self.engine.stats(), time.monotonic()
        if stats.num_steps != self._num_steps:
            self._num_steps, self._stepped_at = stats.num_steps, now
        if stats.num_running or stats.num_waiting:
            return now - self._stepped_at < self._stall_s
        self._stepped_at = now
        if now - self._probed_at < _PROBED_FOR_S:
            return True
        try:
            async with asyncio.timeout(_PROBE_S):
                bos = self.processor.tokenizer.bos_token_id or 0
                await self.engine.complete(functools.partial(self.engine.requests.text, [bos], _PROBE, tenant="health"))
        except (LlavaError, TimeoutError):
            return False
        self._probed_at = time.monotonic()
        return True

    async def drain(self) -> None:
        """Take no more questions, and wait for the answers."""
        await self.engine.drain()

    async def close(self) -> None:
        """End the engine."""
        await self.engine.close()

    def _request(self, question: Question) -> Request:
        requests, who = self.engine.requests, {"tenant": question.tenant, "adapter": question.adapter}
        if not isinstance(question.prompt, Conversation):
            return requests.text(question.prompt, question.params, **who)
        asked = requests.chat(question.prompt, question.params, images=question.images, **who)
        if question.candidate is None:
            return asked
        return requests.scored(question.prompt.reply(question.candidate), asked.prompt, **who)
