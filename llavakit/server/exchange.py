"""One HTTP request and its response, over ASGI.

Owns: Exchange: reading a body within its limits, answering once, streaming to a client that may read slowly or go away.
Invariants: a body is never read further than it may be; a client that is gone ends what works for it; nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.gate import Inside
from llavakit.server.strict_json import parse_json

__all__ = ["ClientGoneError", "Exchange", "Receive", "Scope", "Send"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")
_MOST_PARTS = 64
_TOO_SLOW = 408
_LONG = 1 << 20
_TURNS = 8
"""How often everybody else has a turn between two long bodies, each of which may take 0.3 s to parse."""
_SILENCE_S = 0.5
"""How long a client may pause that is told of an error before it has sent everything."""
_SAFETY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Exchange:
    """A request, its limits, and the way back."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: ServerConfig, request_id: str) -> None:
        self.scope, self.config, self.request_id = scope, config, request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self.address: str = (scope.get("client") or ("",))[0]
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self.status: int | None = None
        self.caller = ""
        self._receive, self._send = receive, send
        self._has_body = False

    def header(self, name: bytes) -> str:
        """Return a header's value; empty where there is none, or more than one."""
        found = [value for known, value in self.headers if known == name]
        return found[0].decode("latin-1") if len(found) == 1 else ""

    async def body(self, inside: Inside) -> bytes:
        """Read the body. Raises: HttpError (413, 408, 415, 503), ClientGoneError."""
        most = self.config.max_body_bytes
        if self.header(b"content-encoding") not in ("", "identity"):
            raise HttpError(415, "unsupported_encoding", "a body must come without content-encoding")
        declared = self.header(b"content-length")
        if declared.isdigit() and int(declared) > most:
            raise _too_large(most)
        parts = bytearray()
        try:
            async with asyncio.timeout(self.config.body_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunk = message.get("body", b"")
                    if len(parts) + len(chunk) > most:
                        raise _too_large(most)
                    inside.take(len(chunk))
                    parts += chunk
                    if not message.get("more_body", False):
                        self._has_body = True
                        return bytes(parts)
        except TimeoutError:
            raise HttpError(_TOO_SLOW, "body_timeout", "the body did not arrive in time") from None

    async def json(self, inside: Inside) -> tuple[Any, Mapping[str, bytes]]:
        """Read a body of JSON, or of a form whose field request is JSON and whose other fields are files. Raises: HttpError."""
        kind, _, options = self.header(b"content-type").partition(";")
        match kind.strip().lower():
            case "application/json":
                return await self._parsed(await self.body(inside), inside), {}
            case "multipart/form-data":
                fields = _fields(await self.body(inside), options)
                request = fields.pop("request", None)
                if request is None:
                    raise HttpError(400, "invalid_form", "a form needs a field request that holds the JSON")
                return await self._parsed(request, inside), fields
        raise HttpError(415, "unsupported_media_type", "a body must be application/json, or multipart/form-data with a field request")

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Wait for work; end it when the client goes away. Raises: ClientGoneError, and what work raises.

        Work runs in the request's own task: another one would keep its error, whose frames know that task.
        """
        task, watching = asyncio.current_task(), asyncio.ensure_future(self._gone())
        assert task is not None
        is_gone = is_over = False

        def leave(_: object) -> None:
            nonlocal is_gone
            if not is_over:
                is_gone = True
                task.cancel()

        watching.add_done_callback(leave)
        try:
            return await work
        except asyncio.CancelledError:
            if is_gone and not task.uncancel():
                raise ClientGoneError from None
            raise
        finally:
            is_over = True
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def respond(self, status: int, body: bytes, kind: str, *, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Answer."""
        own = (*headers, (b"content-length", str(len(body)).encode()))
        await self._start(status, kind, own)
        await self._send({"type": "http.response.body", "body": body})

    async def respond_json(self, value: Any, status: int = 200, *, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Answer with JSON."""
        await self.respond(status, json.dumps(value, ensure_ascii=False).encode(), "application/json", headers=headers)

    async def fail(self, error: HttpError) -> None:
        """Answer with an error; of a body that was not read what still comes is thrown away."""
        headers = [] if error.retry_s is None else [(b"retry-after", str(error.retry_s).encode())]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        is_unread = not self._has_body and self.method not in ("GET", "HEAD")
        if is_unread:
            headers.append((b"connection", b"close"))
        body = json.dumps(error.body()).encode()
        await self._start(error.status, "application/json", (*headers, (b"content-length", str(len(body)).encode())))
        await self._send({"type": "http.response.body", "body": body, "more_body": is_unread})
        if is_unread:
            if error.status != _TOO_SLOW:
                await self._throw_away()
            await self._send({"type": "http.response.body", "body": b""})

    async def stream(self, chunks: AsyncIterator[bytes]) -> None:
        """Answer with server-sent events, as they come."""
        await self._start(200, "text/event-stream", ((b"x-accel-buffering", b"no"),))
        async for chunk in chunks:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def _parsed(self, data: bytes, inside: Inside) -> Any:
        is_long = len(data) > _LONG
        async with inside.parsing.of(is_long):
            value = parse_json(data, max_depth=self.config.max_json_depth, max_marks=self.config.max_json_marks)
            for _ in range(_TURNS if is_long else 0):
                await asyncio.sleep(0)
            return value

    async def _start(self, status: int, kind: str, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.status = status
        known = {name for name, _ in (*headers, *self.extra_headers)}
        defaults = [pair for pair in (*_SAFETY, (b"cache-control", b"no-store")) if pair[0] not in known]
        every = [(b"content-type", kind.encode()), (b"x-request-id", self.request_id.encode()), *defaults, *self.extra_headers, *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": every})

    async def _throw_away(self) -> None:
        """Take what a client still sends, as long as it does: closed at once, it would see a reset connection in place of its answer."""
        until = time.monotonic() + self.config.body_s
        while not self.header(b"expect") and time.monotonic() < until:
            try:
                async with asyncio.timeout(_SILENCE_S):
                    message = await self._receive()
            except TimeoutError:
                return
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _too_large(most: int) -> HttpError:
    return HttpError(413, "body_too_large", f"a request may have {most} bytes")


def _fields(body: bytes, options: str) -> dict[str, bytes]:
    """Cut a form at its boundary: field names and their bytes. Raises: HttpError."""
    found = [option.strip() for option in options.split(";")]
    boundary = next((option.partition("=")[2].strip('"') for option in found if option.lower().startswith("boundary=")), "")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1"))
    if not 1 <= len(boundary) <= 70 or len(parts) < 3 or parts[0] or not parts[-1].startswith(b"--") or len(parts) > _MOST_PARTS:
        raise HttpError(400, "invalid_form", "the form's parts cannot be told apart")
    fields: dict[str, bytes] = {}
    for part in parts[1:-1]:
        head, has_head, content = part.partition(b"\r\n\r\n")
        name = next((field[len(b'name="') :].rstrip(b'"') for field in _dispositions(head) if field.startswith(b'name="')), b"")
        text = name.decode("latin-1")
        if not has_head or not text or len(text) > 128 or not text.isprintable() or text in fields:
            raise HttpError(400, "invalid_form", "each part of a form needs a name of its own")
        fields[text] = content
    return fields


def _dispositions(head: bytes) -> list[bytes]:
    lines = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")]
    return [field.strip() for field in lines[0].split(b";")] if lines else []
