"""The application: which path does what, for whom, and under which rules. Speaks ASGI.

Owns: App. Invariants: every path but those of PUBLIC wants a key where there are any, and a path is compared as the server got it;
every request is answered once, in OpenAI's form where it failed; nothing of a request but its path, status and times is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from llavakit.engine.request import TokenEvent
from llavakit.logs import logger
from llavakit.server.backend import Answering
from llavakit.server.config import ServerConfig
from llavakit.server.exchange import ClientGoneError, Exchange, Receive, Scope, Send
from llavakit.server.faults import HttpError, fault_of
from llavakit.server.gate import Gate, Inside
from llavakit.server.keys import Caller, Keys, WrongKeys
from llavakit.server.openapi import document
from llavakit.server.pages import PAGES
from llavakit.server.protocol import ChatRequest, CompletionRequest, ScoreRequest, TokenizeRequest, read_request
from llavakit.server.replies import DONE, Chat, Form, Text, event
from llavakit.server.service import Service
from llavakit.types import Completion

__all__ = ["App"]

_LOG = logger("server")
_LOOK_S = 0.25
_OWN_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_PREFLIGHT = ((b"access-control-allow-methods", b"GET, POST"), (b"access-control-allow-headers", b"authorization, content-type"))
Handler = Callable[[Exchange, Caller], Awaitable[None]]


class App:
    """One service over HTTP."""

    def __init__(self, service: Service, config: ServerConfig, keys: Keys, *, is_sagemaker: bool = False) -> None:
        """With is_sagemaker /ping and /invocations are there too."""
        self.service, self.config, self.keys = service, config, keys
        self.gate = Gate(config, most=service.most_requests, has_keys=len(keys) > 0)
        self.wrong_keys = WrongKeys(config.wrong_keys_per_s)
        self.public = {"/health", *PAGES}
        self.routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": self._openapi},
            "/v1/models": {"GET": self._models},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._complete},
            "/v1/tokenize": {"POST": self._tokenize},
            "/v1/score": {"POST": self._score},
            **{path: {"GET": self._page} for path in PAGES},
        }
        if is_sagemaker:
            self.routes |= {"/ping": {"GET": self._health}, "/invocations": {"POST": self._invoke}}
            self.public |= {"/ping", "/invocations"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request, or the beginning and end of the server."""
        match scope["type"]:
            case "lifespan":
                await self._live(receive, send)
            case "http":
                await self._serve(Exchange(scope, receive, send, self.config, secrets.token_hex(12)))

    async def drain(self) -> None:
        """Let nobody in any more, and wait for those inside, as long as they may take."""
        self.gate.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s):
                await self.service.backend.drain()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.service.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, exchange: Exchange) -> None:
        began, route = time.monotonic(), exchange.path if exchange.path in self.routes else "other"
        try:
            await self._answer(exchange)
        except ClientGoneError:
            exchange.status = exchange.status or 499
        except Exception as error:  # the edge of the server: whatever happened is told in its form
            _note(error, "a request failed", request=exchange.request_id)
            if exchange.status is not None:
                raise  # an answer that has begun ends here, and the connection with it
            await exchange.fail(fault_of(error))
        finally:
            seconds = time.monotonic() - began
            self.service.metrics.responses.labels(route, str(exchange.status or 0)).inc()
            self.service.metrics.latency.labels(route).observe(seconds)
            fields = {"request": exchange.request_id, "method": exchange.method, "route": route, "status": exchange.status}
            _LOG.info("served", extra={"fields": {**fields, "caller": exchange.caller, "seconds": round(seconds, 4)}})

    async def _answer(self, exchange: Exchange) -> None:
        num_bytes = len(exchange.path) + sum(len(name) + len(value) for name, value in exchange.headers)
        if len(exchange.headers) > self.config.max_headers or num_bytes > self.config.max_header_bytes:
            raise HttpError(431, "head_too_large", "the head of the request is too large")
        self._check_host(exchange)
        if not self._check_origin(exchange):
            await exchange.respond(204, b"", "text/plain", headers=_PREFLIGHT)
            return
        caller = Caller("everybody", "") if exchange.path in self.public else self._caller(exchange)
        exchange.caller = caller.name
        handlers = self.routes.get(exchange.path)
        if handlers is None and exchange.path.startswith("/v1/models/"):
            handlers = {"GET": self._model}
        if handlers is None:
            raise HttpError(404, "not_found", "there is no such path")
        handler = handlers.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            raise HttpError(405, "method_not_allowed", f"the path takes {', '.join(handlers)}")
        await handler(exchange, caller)

    def _caller(self, exchange: Exchange) -> Caller:
        """Tell who asks. Raises: HttpError (401, 429)."""
        try:
            return self.keys.caller(exchange.headers)
        except HttpError:
            if exchange.header(b"authorization"):  # a question without any key is no guess
                self.wrong_keys.take(exchange.address)
            raise

    def _check_host(self, exchange: Exchange) -> None:
        """Refuse names that are not the server's: without keys a page elsewhere could make its name point here. Raises: HttpError."""
        allowed = self.config.allowed_hosts
        if len(self.keys) or "*" in allowed:
            return
        host = exchange.header(b"host")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in (*_OWN_HOSTS, self.config.host, *allowed):
            raise HttpError(403, "host_not_allowed", "the server is not called by that name; see --allowed-hosts")

    def _check_origin(self, exchange: Exchange) -> bool:
        """Refuse other servers' pages, unless they are allowed; returns False for a browser that only asks. Raises: HttpError (403)."""
        origin = exchange.header(b"origin")
        if not any(name == b"origin" for name, _ in exchange.headers):
            return True
        if origin in self.config.allowed_origins:
            exchange.extra_headers += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
            return exchange.method != "OPTIONS"
        if origin.partition("://")[2] != exchange.header(b"host") or not origin:
            raise HttpError(403, "origin_not_allowed", "pages of other servers may not use this one; see --allowed-origins")
        return True

    # Paths

    async def _health(self, exchange: Exchange, caller: Caller) -> None:
        del caller
        is_healthy = await self.service.backend.is_healthy()
        await exchange.respond_json({"status": "ok" if is_healthy else "unhealthy"}, 200 if is_healthy else 503)

    async def _ready(self, exchange: Exchange, caller: Caller) -> None:
        del caller
        is_ready = (
            not self.gate.is_draining and self.gate.num_inside < self.service.most_requests and await self.service.backend.is_healthy()
        )
        await exchange.respond_json({"status": "ready" if is_ready else "busy"}, 200 if is_ready else 503)

    async def _metrics(self, exchange: Exchange, caller: Caller) -> None:
        del caller
        written = self.service.metrics.write(await self.service.backend.stats())
        await exchange.respond(200, written, "text/plain; version=0.0.4")

    async def _openapi(self, exchange: Exchange, caller: Caller) -> None:
        del caller
        await exchange.respond_json(document())

    async def _page(self, exchange: Exchange, caller: Caller) -> None:
        del caller
        page = PAGES[exchange.path]
        await exchange.respond(200, page.data, page.kind, headers=page.headers)

    async def _models(self, exchange: Exchange, caller: Caller) -> None:
        del caller
        await exchange.respond_json({"object": "list", "data": [self._described(name) for name in self.service.models()]})

    async def _model(self, exchange: Exchange, caller: Caller) -> None:
        del caller
        name = exchange.path.removeprefix("/v1/models/")
        if name not in self.service.models():
            raise HttpError(404, "model_not_found", "there is no model of that name; GET /v1/models lists them", param="model")
        await exchange.respond_json(self._described(name))

    async def _chat(self, exchange: Exchange, caller: Caller) -> None:
        with self.gate.enter(caller) as inside:
            values, uploads = await exchange.json(inside)
            await self._chat_of(exchange, inside, values, uploads)

    async def _complete(self, exchange: Exchange, caller: Caller) -> None:
        with self.gate.enter(caller) as inside:
            values, _ = await exchange.json(inside)
            await self._complete_of(exchange, inside, values)

    async def _invoke(self, exchange: Exchange, caller: Caller) -> None:
        """Answer as SageMaker asks: either kind of request."""
        with self.gate.enter(caller) as inside:
            values, uploads = await exchange.json(inside)
            if isinstance(values, dict):
                values.setdefault("model", self.service.name)
            if isinstance(values, dict) and "prompt" in values:
                await self._complete_of(exchange, inside, values)
            else:
                await self._chat_of(exchange, inside, values, uploads)

    async def _tokenize(self, exchange: Exchange, caller: Caller) -> None:
        with self.gate.enter(caller) as inside:
            values, uploads = await exchange.json(inside)
            asked = read_request(TokenizeRequest, values)
            found = json.dumps(await exchange.unless_gone(self.service.tokenize(asked, inside, uploads))).encode()
            inside.take(len(found))  # twenty times the text that was asked about, and its reader may be slow
            await exchange.respond(200, found, "application/json")

    async def _score(self, exchange: Exchange, caller: Caller) -> None:
        with self.gate.enter(caller) as inside:
            values, uploads = await exchange.json(inside)
            asked = read_request(ScoreRequest, values)
            async with asyncio.timeout(self.config.request_s):
                scores = await exchange.unless_gone(self.service.score(asked, inside, uploads))
            data = [
                {
                    "text": one.text,
                    "logprob": one.logprob,
                    "mean_logprob": one.mean_logprob,
                    "share": one.share,
                    "num_tokens": len(one.tokens),
                }
                for one in scores
            ]
            await exchange.respond_json({"object": "list", "model": asked.model, "data": data})

    # Answers

    async def _chat_of(self, exchange: Exchange, inside: Inside, values: Any, uploads: Mapping[str, bytes]) -> None:
        asked = read_request(ChatRequest, values)
        form = Chat(exchange.request_id, asked.model, self.service.backend.processor.tokenizer, has_usage=_wants_usage(asked))
        await exchange.unless_gone(self._run(exchange, functools.partial(self.service.chat, asked, inside, uploads), asked, form))

    async def _complete_of(self, exchange: Exchange, inside: Inside, values: Any) -> None:
        asked = read_request(CompletionRequest, values)
        form = Text(exchange.request_id, asked.model, self.service.backend.processor.tokenizer, has_usage=_wants_usage(asked))
        await exchange.unless_gone(self._run(exchange, functools.partial(self.service.complete, asked, inside), asked, form))

    async def _run(
        self, exchange: Exchange, submit: Callable[[], Awaitable[list[Answering]]], asked: ChatRequest | CompletionRequest, form: Form
    ) -> None:
        """Answer a request for text, whole or in pieces."""
        if asked.stream_options is not None and not asked.stream:
            raise HttpError(400, "invalid_value", "stream_options needs stream to be true", param="stream_options")
        began = time.monotonic()
        async with contextlib.AsyncExitStack() as open_streams:
            async with asyncio.timeout(self.config.request_s):
                streams = await submit()
            for stream in streams:
                await open_streams.enter_async_context(stream)
            num_choices = asked.n or 1
            found = self._events(streams, limit_s=self.config.request_s - (time.monotonic() - began))
            if asked.stream:
                # What fails before the first token still has a status of its own.
                first = await anext(found)
                await exchange.stream(self._pieces(first, found, form, num_choices, len(streams), has_usage=_wants_usage(asked)))
                return
            answers = _Answers(len(streams), num_choices)
            async for number, one in found:
                answers.take(number, one)
            await exchange.respond_json(form.whole(answers.groups()))

    async def _pieces(
        self,
        first: tuple[int, TokenEvent],
        rest: AsyncIterator[tuple[int, TokenEvent]],
        form: Form,
        num_choices: int,
        num_prompts: int,
        *,
        has_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Write events as they come; a failure is an event too, and then nothing claims to be done."""
        answers = _Answers(num_prompts, num_choices)
        for chunk in form.opening(num_choices * num_prompts):
            yield event(chunk)
        try:
            async for number, one in _chained(first, rest):
                answers.take(number, one)
                if written := b"".join(map(event, form.piece(one, first=number * num_choices))):
                    yield written
        except Exception as error:  # told in the stream, since its status is sent
            _note(error, "a stream failed")
            yield event(fault_of(error).body())
            return
        if has_usage:
            yield event(form.usage(answers.groups()))
        yield DONE

    async def _events(self, streams: Sequence[Answering], *, limit_s: float) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield the events of streams, as they come, with the number of each one's stream.

        Raises: HttpError (503), TimeoutError after limit_s, what ended one.
        """
        metrics, began, latest = self.service.metrics, time.monotonic(), None
        async for number, one in _merged(streams, functools.partial(self._check_queue, streams, began), limit_s):
            now = time.monotonic()
            if latest is None:
                metrics.first_token.observe(now - began)
            else:
                metrics.between_tokens.observe(now - latest)
            latest = now
            yield number, one

    def _check_queue(self, streams: Sequence[Answering], began: float) -> None:
        if time.monotonic() - began > self.config.queue_s and all(map(self.service.backend.is_queued, streams)):
            raise HttpError(503, "queue_timeout", "the request waited too long for its turn; try again later", retry_s=5)

    def _described(self, name: str) -> dict[str, Any]:
        described = {"id": name, "object": "model", "created": self.service.created, "owned_by": "llavakit"}
        parent = {"root": self.service.name} if name != self.service.name else {}
        return {**described, **parent, "max_model_len": self.service.backend.context_len}


class _Answers:
    """The finished answers of some prompts, in the order of their numbers."""

    def __init__(self, num_prompts: int, num_choices: int) -> None:
        self._found: list[dict[int, Completion]] = [{} for _ in range(num_prompts)]
        self._num_choices = num_choices

    def take(self, number: int, found: TokenEvent) -> None:
        """Keep the answer of an event where it ends one."""
        if found.completion is not None:
            self._found[number][found.answer] = found.completion

    def groups(self) -> list[list[Completion]]:
        """Return all answers."""
        assert all(len(group) == self._num_choices for group in self._found), "every answer ends once"
        return [[group[place] for place in sorted(group)] for group in self._found]


def _note(error: Exception, what: str, **fields: str) -> None:
    """Log an error that is not the client's."""
    if fault_of(error).status == 500:
        _LOG.error(what, exc_info=error, extra={"fields": fields})


def _wants_usage(asked: ChatRequest | CompletionRequest) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


async def _chained(first: tuple[int, TokenEvent], rest: AsyncIterator[tuple[int, TokenEvent]]) -> AsyncIterator[tuple[int, TokenEvent]]:
    yield first
    async for found in rest:
        yield found


async def _merged(streams: Sequence[Answering], check: Callable[[], None], limit_s: float) -> AsyncIterator[tuple[int, TokenEvent]]:
    """Yield the events of streams as they come; until the first one check is called now and then. Raises: TimeoutError after limit_s."""
    queue: asyncio.Queue[tuple[int, TokenEvent | BaseException | None]] = asyncio.Queue()
    limit = asyncio.get_running_loop().call_later(max(limit_s, 0), queue.put_nowait, (0, TimeoutError()))
    following = [asyncio.ensure_future(_follow(number, stream, queue)) for number, stream in enumerate(streams)]
    try:
        left, found = len(streams), await _first(queue, check)
        while True:
            number, one = found
            if isinstance(one, BaseException):
                try:
                    raise one
                finally:
                    del one, found  # the error knows this frame
            left -= one is None
            if one is not None:
                yield number, one
            if not left:
                return
            found = await queue.get()
    finally:
        limit.cancel()
        for task in following:
            task.cancel()


async def _follow(number: int, stream: Answering, queue: asyncio.Queue[tuple[int, TokenEvent | BaseException | None]]) -> None:
    try:
        async for found in stream:
            queue.put_nowait((number, found))
        queue.put_nowait((number, None))
    except Exception as error:  # handed to whoever reads the queue
        queue.put_nowait((number, error))


async def _first(
    queue: asyncio.Queue[tuple[int, TokenEvent | BaseException | None]], check: Callable[[], None]
) -> tuple[int, TokenEvent | BaseException | None]:
    while True:
        try:
            async with asyncio.timeout(_LOOK_S):
                return await queue.get()
        except TimeoutError:
            check()
