"""Requests on their way to the engine and back, without HTTP.

Owns: Service: which model answers, pictures made ready, prompts checked before anything is decoded, the engine's health.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llavakit.engine.llm import LLM
from llavakit.engine.service import AsyncEngine, Stream
from llavakit.errors import BusyError, ImageError, LlavaError, PromptError
from llavakit.geometry import num_image_tokens
from llavakit.server.asking import completion_params_of, conversation_of, params_of
from llavakit.server.config import ServerConfig
from llavakit.server.decoders import Decoders
from llavakit.server.faults import HttpError, fault_of
from llavakit.server.fetch import Fetcher
from llavakit.server.keys import Caller
from llavakit.server.media import picture_bytes, picture_places
from llavakit.server.metrics import Metrics
from llavakit.server.protocol import ChatMessage, ChatRequest, CompletionRequest, ScoreRequest, TokenizeRequest
from llavakit.types import Conversation, SamplingParams, Scored

__all__ = ["Service"]

_PROBE = SamplingParams(max_tokens=1)
_PROBE_S = 10.0
_PROBED_FOR_S = 2.0
"""How long a probe speaks for an idle engine."""
Uploads = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A conversation, checked, with its pictures decoded."""

    conversation: Conversation
    images: list[Image.Image]
    adapter: str


class Service:
    """One model, ready to be asked by many."""

    def __init__(self, llm: LLM, name: str, config: ServerConfig, *, fetcher: Fetcher | None = None) -> None:
        """Start the engine's thread; the model belongs to it from here on. name is what requests call the model."""
        self.llm, self.name, self.config = llm, name, config
        self.created = int(time.time())
        self.engine = AsyncEngine(llm, max_waiting=llm.engine.settings.max_batch + config.max_waiting)
        self.decoders, self.fetcher, self.metrics = Decoders(config), fetcher or Fetcher(config), Metrics()
        self._num_steps, self._stepped_at = -1, time.monotonic()
        self._probed_at = float("-inf")

    @property
    def most_requests(self) -> int:
        """How many requests may run and wait."""
        return self.llm.engine.settings.max_batch + self.config.max_waiting

    @property
    def num_ids(self) -> int:
        """Ids of the tokenizer."""
        return len(self.llm.processor.tokenizer)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that a prompt may have."""
        room = self.engine.requests.context_len - 1
        return room if self.config.max_prompt_tokens is None else min(room, self.config.max_prompt_tokens)

    def models(self) -> list[str]:
        """List the model and its adapters, by the names that requests use."""
        return [self.name, *self.llm.adapters]

    async def chat(self, request: ChatRequest, caller: Caller, uploads: Uploads) -> list[Stream]:
        """Ask a conversation. Raises: HttpError."""
        params = params_of(request, self.config, self.num_ids)
        asked = await self._asked(request.model, request.messages, uploads)
        make = functools.partial(
            self.engine.requests.chat, asked.conversation, params, images=asked.images, tenant=caller.tenant, adapter=asked.adapter
        )
        return [await self._submit(make)]

    async def complete(self, request: CompletionRequest, caller: Caller) -> list[Stream]:
        """Continue texts. Raises: HttpError."""
        adapter, params = self._adapter(request.model), completion_params_of(request, self.config, self.num_ids)
        prompts = _prompts(request.prompt)
        if len(prompts) * params.n > self.config.max_choices:
            raise HttpError(400, "invalid_value", f"a request may have {self.config.max_choices} answers, over all prompts", param="prompt")
        if any(isinstance(index, int) and not 0 <= index < self.num_ids for prompt in prompts for index in prompt):
            raise HttpError(400, "invalid_value", f"ids are from 0 to {self.num_ids - 1}", param="prompt")
        async with contextlib.AsyncExitStack() as submitted:  # ends those that are submitted where one is refused
            streams: list[Stream] = []
            for prompt in prompts:
                make = functools.partial(self._text, prompt, params, caller.tenant, adapter)
                streams.append(await submitted.enter_async_context(await self._submit(make, param="prompt")))
            submitted.pop_all()
        return streams

    async def score(self, request: ScoreRequest, caller: Caller, uploads: Uploads) -> list[Scored]:
        """Tell how likely answers are. Raises: HttpError."""
        if len(request.candidates) > self.config.max_candidates or not all(request.candidates):
            limit = f"candidates are 1 to {self.config.max_candidates} texts that are not empty"
            raise HttpError(400, "invalid_value", limit, param="candidates")
        asked = await self._asked(request.model, request.messages, uploads)
        requests = self.engine.requests
        try:
            chat = functools.partial(requests.chat, asked.conversation, _PROBE, images=asked.images)
            prompt = (await asyncio.to_thread(chat)).prompt
            makers = [
                functools.partial(requests.scored, asked.conversation.reply(text), prompt, tenant=caller.tenant, adapter=asked.adapter)
                for text in request.candidates
            ]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.engine.complete(make)) for make in makers]
        except* (LlavaError, HttpError) as errors:
            raise fault_of(errors.exceptions[0], param="candidates") from None
        found = [task.result().prompt_logprobs or () for task in tasks]
        return Scored.of(request.candidates, found)

    async def tokenize(self, request: TokenizeRequest, uploads: Uploads) -> dict[str, Any]:
        """Tell what a conversation or a text costs. Raises: HttpError."""
        self._adapter(request.model)
        processor, requests = self.llm.processor, self.engine.requests
        if (request.messages is None) == (request.prompt is None):
            raise HttpError(400, "invalid_value", "give either messages or prompt", param="messages")
        if request.messages is None:
            assert request.prompt is not None
            ids = (await asyncio.to_thread(requests.prompt, request.prompt)).ids
            return {"count": len(ids), "max_model_len": requests.context_len, "tokens": list(ids), "images": []}
        places = picture_places(request.messages)
        pictures = await picture_bytes(places, uploads, self.config, self.fetcher)
        conversation = conversation_of(request.messages, pictures, self.config)
        try:
            sizes = await self.decoders.sizes(pictures)
            grids = processor.grids(sizes)
            encode = functools.partial(processor.encode_chat, conversation, grids, add_generation_prompt=request.add_generation_prompt)
            ids = (await asyncio.to_thread(encode))[1].ids
        except LlavaError as error:
            raise fault_of(error, param="messages") from error
        images = [
            {"width": width, "height": height, "tokens": num_image_tokens(grid)} for (width, height), grid in zip(sizes, grids, strict=True)
        ]
        return {"count": len(ids), "max_model_len": requests.context_len, "tokens": list(ids), "images": images}

    async def is_healthy(self) -> bool:
        """Tell whether the engine computes: it made a step of late, or, where it has nothing to do, answers a probe."""
        if not self.engine.is_healthy:
            return False
        stats, now = self.engine.stats(), time.monotonic()
        if stats.num_steps != self._num_steps:
            self._num_steps, self._stepped_at = stats.num_steps, now
        if stats.num_running or stats.num_waiting:
            return now - self._stepped_at < self.config.stall_s
        self._stepped_at = now
        if now - self._probed_at < _PROBED_FOR_S:
            return True
        try:
            async with asyncio.timeout(_PROBE_S):
                bos = self.llm.processor.tokenizer.bos_token_id or 0
                await self.engine.complete(functools.partial(self.engine.requests.text, [bos], _PROBE, tenant="health"))
        except (LlavaError, TimeoutError):
            return False
        self._probed_at = time.monotonic()
        return True

    async def close(self) -> None:
        """End everything."""
        await self.engine.close()
        await self.decoders.close()

    # What a request needs

    def _adapter(self, model: str) -> str:
        if model == self.name:
            return ""
        if model not in self.llm.adapters:
            raise HttpError(404, "model_not_found", "there is no model of that name; GET /v1/models lists them", param="model")
        return model

    async def _asked(self, model: str, messages: Sequence[ChatMessage], uploads: Uploads) -> _Asked:
        """Check a conversation from its pictures' headers, then decode them. Raises: HttpError."""
        adapter = self._adapter(model)
        pictures = await picture_bytes(picture_places(messages), uploads, self.config, self.fetcher)
        conversation = conversation_of(messages, pictures, self.config)
        processor = self.llm.processor
        try:
            sizes = await self.decoders.sizes(pictures)
            if sum(width * height for width, height in sizes) > self.config.max_images_pixels:
                raise ImageError(f"the pictures have more than {self.config.max_images_pixels} pixels together; scale them down")
            encode = functools.partial(processor.encode_chat, conversation, processor.grids(sizes))
            num_tokens = len((await asyncio.to_thread(encode))[1].ids)
            if num_tokens > self.max_prompt_tokens:
                raise PromptError(
                    f"the prompt has {num_tokens} tokens with its {len(pictures)} pictures, at most {self.max_prompt_tokens} fit"
                )
            images = await self.decoders.images(pictures)
        except LlavaError as error:
            if isinstance(error, ImageError):
                self.metrics.decoded.inc()
            raise fault_of(error, param="messages") from error
        return _Asked(conversation, images, adapter)

    def _text(self, prompt: str | list[int], params: SamplingParams, tenant: str, adapter: str) -> Any:
        request = self.engine.requests.text(prompt, params, tenant=tenant, adapter=adapter)
        if len(request.prompt.ids) > self.max_prompt_tokens:
            raise PromptError(f"the prompt has {len(request.prompt.ids)} tokens, at most {self.max_prompt_tokens} fit")
        return request

    async def _submit(self, make: Any, *, param: str | None = None) -> Stream:
        try:
            return await self.engine.submit(make)
        except BusyError as error:
            raise fault_of(error) from error
        except LlavaError as error:
            raise fault_of(error, param=param) from error


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """Return the prompts of a request one by one. Raises: HttpError for none."""
    if not prompt or (not isinstance(prompt, str) and not all(one for one in prompt if not isinstance(one, int))):
        raise HttpError(400, "invalid_value", "a prompt must hold something", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt
