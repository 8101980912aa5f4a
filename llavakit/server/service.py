"""Requests on their way to the engine and back, without HTTP.

Owns: Service: which model answers, pictures made ready, prompts checked before anything is decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llavakit.engine.factory import text_ids
from llavakit.errors import ImageError, LengthError, LlavaError
from llavakit.geometry import num_image_tokens
from llavakit.server.asking import completion_params_of, conversation_of, params_of
from llavakit.server.backend import Answering, Backend, Question
from llavakit.server.config import ServerConfig
from llavakit.server.decoders import Decoders
from llavakit.server.faults import HttpError, fault_of
from llavakit.server.fetch import Fetcher
from llavakit.server.gate import Inside
from llavakit.server.media import picture_bytes, picture_places
from llavakit.server.metrics import Metrics
from llavakit.server.protocol import ChatMessage, ChatRequest, CompletionRequest, ScoreRequest, TokenizeRequest
from llavakit.server.room import Room
from llavakit.types import Conversation, SamplingParams, Scored, TokenLogprob

__all__ = ["Service"]

_SCORING = SamplingParams(max_tokens=1)
Uploads = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A conversation, checked, with its pictures decoded."""

    conversation: Conversation
    images: tuple[Image.Image, ...]
    adapter: str


class Service:
    """One model, ready to be asked by many."""

    def __init__(self, backend: Backend, name: str, config: ServerConfig, *, fetcher: Fetcher | None = None) -> None:
        """Name is what requests call the model."""
        self.backend, self.name, self.config = backend, name, config
        self.created = int(time.time())
        self.decoders, self.fetcher, self.metrics = Decoders(config), fetcher or Fetcher(config), Metrics()
        self.room = Room(config.max_held_pixels)

    @property
    def most_requests(self) -> int:
        """How many requests may run and wait."""
        return self.backend.max_batch + self.config.max_waiting

    @property
    def num_ids(self) -> int:
        """Ids of the tokenizer."""
        return len(self.backend.processor.tokenizer)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that a prompt may have."""
        room = self.backend.context_len - 1
        return room if self.config.max_prompt_tokens is None else min(room, self.config.max_prompt_tokens)

    def models(self) -> list[str]:
        """List the model and its adapters, by the names that requests use."""
        return [self.name, *self.backend.adapters]

    async def chat(self, request: ChatRequest, inside: Inside, uploads: Uploads) -> list[Answering]:
        """Ask a conversation. Raises: HttpError."""
        params = params_of(request, self.config, self.num_ids)
        async with self._asked(request.model, request.messages, inside, uploads) as asked:
            return [await self._submit(Question(asked.conversation, params, asked.images, inside.caller.tenant, asked.adapter))]

    async def complete(self, request: CompletionRequest, inside: Inside) -> list[Answering]:
        """Continue texts. Raises: HttpError."""
        adapter, params = self._adapter(request.model), completion_params_of(request, self.config, self.num_ids)
        prompts = _prompts(request.prompt)
        if len(prompts) * params.n > self.config.max_choices:
            raise HttpError(400, "invalid_value", f"a request may have {self.config.max_choices} answers, over all prompts", param="prompt")
        if any(isinstance(index, int) and not 0 <= index < self.num_ids for prompt in prompts for index in prompt):
            raise HttpError(400, "invalid_value", f"ids are from 0 to {self.num_ids - 1}", param="prompt")
        async with contextlib.AsyncExitStack() as submitted:  # ends those that are submitted where one is refused
            answers: list[Answering] = []
            for prompt in prompts:
                question = Question(await self._ids(prompt), params, tenant=inside.caller.tenant, adapter=adapter)
                answers.append(await submitted.enter_async_context(await self._submit(question, param="prompt")))
            submitted.pop_all()
        return answers

    async def score(self, request: ScoreRequest, inside: Inside, uploads: Uploads) -> list[Scored]:
        """Tell how likely answers are. Raises: HttpError."""
        if len(request.candidates) > self.config.max_candidates or not all(request.candidates):
            limit = f"candidates are 1 to {self.config.max_candidates} texts that are not empty"
            raise HttpError(400, "invalid_value", limit, param="candidates")
        first, *others = request.candidates
        most, tenant = self.config.max_choices, inside.caller.tenant
        async with self._asked(request.model, request.messages, inside, uploads) as asked:
            found = await self._scored(asked, [first], tenant)  # what the others share is in the cache then
            for place in range(0, len(others), most):
                found += await self._scored(asked, others[place : place + most], tenant)
        return Scored.of(request.candidates, found)

    async def tokenize(self, request: TokenizeRequest, inside: Inside, uploads: Uploads) -> dict[str, Any]:
        """Tell what a conversation or a text costs. Raises: HttpError."""
        self._adapter(request.model)
        processor = self.backend.processor
        if (request.messages is None) == (request.prompt is None):
            raise HttpError(400, "invalid_value", "give either messages or prompt", param="messages")
        if request.messages is None:
            assert request.prompt is not None
            found = await asyncio.to_thread(text_ids, processor, request.prompt)
            return {"count": len(found), "max_model_len": self.backend.context_len, "tokens": found, "images": []}
        places = picture_places(request.messages)
        pictures = await picture_bytes(places, uploads, self.config, self.fetcher, inside)
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
        return {"count": len(ids), "max_model_len": self.backend.context_len, "tokens": list(ids), "images": images}

    async def close(self) -> None:
        """End everything."""
        await self.backend.close()
        await self.decoders.close()

    # What a request needs

    def _adapter(self, model: str) -> str:
        if model == self.name:
            return ""
        if model not in self.backend.adapters:
            raise HttpError(404, "model_not_found", "there is no model of that name; GET /v1/models lists them", param="model")
        return model

    @contextlib.asynccontextmanager
    async def _asked(self, model: str, messages: Sequence[ChatMessage], inside: Inside, uploads: Uploads) -> AsyncIterator[_Asked]:
        """Check a conversation from its pictures' headers, then decode them, which the block may use. Raises: HttpError."""
        adapter = self._adapter(model)
        pictures = await picture_bytes(picture_places(messages), uploads, self.config, self.fetcher, inside)
        conversation = conversation_of(messages, pictures, self.config)
        processor = self.backend.processor
        try:
            sizes = await self.decoders.sizes(pictures)
            num_pixels = sum(width * height for width, height in sizes)
            if num_pixels > self.config.max_images_pixels:
                raise ImageError(f"the pictures have more than {self.config.max_images_pixels} pixels together; scale them down")
            grids = processor.grids(sizes)
            encode = functools.partial(processor.encode_chat, conversation, grids)
            num_tokens = len((await asyncio.to_thread(encode))[1].ids)
            if num_tokens > self.max_prompt_tokens:
                raise LengthError(
                    f"the prompt has {num_tokens} tokens with its {len(pictures)} pictures, at most {self.max_prompt_tokens} fit"
                )
        except LlavaError as error:
            raise self._refused(error) from error
        inside.take(processor.tile_bytes(grids))
        async with self.room.of(num_pixels):
            try:
                images = await self.decoders.images(pictures)
            except LlavaError as error:
                raise self._refused(error) from error
            yield _Asked(conversation, tuple(images), adapter)

    def _refused(self, error: LlavaError) -> HttpError:
        if isinstance(error, ImageError):
            self.metrics.refused.inc()
        return fault_of(error, param="messages")

    async def _ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Return a prompt's ids. Raises: HttpError for too many."""
        ids = await asyncio.to_thread(text_ids, self.backend.processor, prompt) if isinstance(prompt, str) else prompt
        if len(ids) > self.max_prompt_tokens:
            message = f"the prompt has {len(ids)} tokens, at most {self.max_prompt_tokens} fit"
            raise HttpError(400, "context_length_exceeded", message, param="prompt")
        return tuple(ids)

    async def _scored(self, asked: _Asked, candidates: Sequence[str], tenant: str) -> list[tuple[TokenLogprob, ...]]:
        """Return the log probabilities of some candidates' tokens, computed together. Raises: HttpError."""
        questions = [Question(asked.conversation, _SCORING, asked.images, tenant, asked.adapter, one) for one in candidates]
        async with contextlib.AsyncExitStack() as submitted:
            answers = [await submitted.enter_async_context(await self._submit(one, param="candidates")) for one in questions]
            try:
                completions = [[one.completion async for one in each if one.completion is not None][-1] for each in answers]
            except LlavaError as error:
                raise fault_of(error, param="candidates") from error
        return [completion.prompt_logprobs or () for completion in completions]

    async def _submit(self, question: Question, *, param: str | None = None) -> Answering:
        try:
            return await self.backend.submit(question)
        except LlavaError as error:
            raise fault_of(error, param=param) from error


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """Return the prompts of a request one by one. Raises: HttpError for none."""
    if not prompt or (not isinstance(prompt, str) and not all(one for one in prompt if not isinstance(one, int))):
        raise HttpError(400, "invalid_value", "a prompt must hold something", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt
