"""A server in the test's own process or another, and clients that say exactly what they are told to.

Owns: running, Running (its application, is_quiet), apart, Server (its address and its clients: ask, raw) and chat_body.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import http.client
import json
import multiprocessing
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from llavakit.engine.llm import LLM
from llavakit.engine.service import AsyncEngine
from llavakit.server.address import bind
from llavakit.server.app import App
from llavakit.server.backend import Backend, LocalBackend
from llavakit.server.config import ServerConfig
from llavakit.server.fetch import Fetcher
from llavakit.server.keys import Keys
from llavakit.server.run import Leaving, host, settle
from llavakit.server.service import Service
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene

__all__ = ["MODEL", "Reply", "Running", "Server", "apart", "chat_body", "data_url", "miniature", "picture", "running"]

MODEL = "mini"
_WAIT_S = 20.0


@dataclass(frozen=True)
class Reply:
    """One response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])

    def events(self) -> list[Any]:
        """The data of its server-sent events; [DONE] is None."""
        data = [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [None if text == "[DONE]" else json.loads(text) for text in data]


class Server:
    """A server on a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        """Send one request; a body that is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, {**kind, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, body: Any = None, headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
        """Ask for an answer."""
        return self.ask("POST", "/v1/chat/completions", body if body is not None else chat_body(**fields), headers)

    def connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        """Open a socket."""
        plain = socket.socket()
        if receive_bytes is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        plain.settimeout(30)
        plain.connect(("127.0.0.1", self.port))
        return plain

    def raw(self, data: bytes) -> bytes:
        """Send bytes and return all that comes back until the server closes."""
        with self.connect() as plain:
            plain.sendall(data)
            parts = []
            try:
                while part := plain.recv(1 << 16):
                    parts.append(part)
            except ConnectionResetError:
                pass
        return b"".join(parts)

    def counts(self) -> dict[str, float]:
        """Its metrics without labels."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#" and "{" not in line)}


class Running(Server):
    """A server that runs in this process."""

    def __init__(self, app: App, port: int, loop: asyncio.AbstractEventLoop, leaving: Leaving) -> None:
        super().__init__(port)
        self.app, self.loop, self.leaving = app, loop, leaving

    def call(self, make: Callable[[], Any]) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(make(), self.loop).result(30)

    @property
    def engine(self) -> AsyncEngine:
        """The engine that answers."""
        backend = self.app.service.backend
        assert isinstance(backend, LocalBackend)
        return backend.engine

    def is_quiet(self) -> bool:
        """Wait until nothing of any request is left: no request, no block, no slot, no memory."""
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            gate, room = self.app.gate, self.app.service.room
            held = (stats.num_running, stats.num_waiting, stats.num_used_blocks, gate.num_inside, gate.num_bytes, room.used)
            if not any(held):
                return True
            time.sleep(0.01)
        return False


@functools.cache
def miniature() -> LLM:
    """The embedded model, small enough to fill up quickly."""
    return LLM(max_batch=8, kv_memory=64 << 20, device="cpu", dtype="float32")


@contextmanager
def running(
    config: ServerConfig | None = None,
    *,
    keys: tuple[str, ...] = (),
    llm: LLM | None = None,
    backend: Backend | None = None,
    fetcher: Callable[[ServerConfig], Fetcher] | None = None,
    name: str = MODEL,
    is_sagemaker: bool = False,
) -> Iterator[Running]:
    """Run a server on a free port of this machine until the block is left."""
    config = ServerConfig(port=0) if config is None else config
    listener = bind(config, Keys(keys))
    port = listener.getsockname()[1]
    ready, found = threading.Event(), list[Running]()

    async def whole() -> None:
        answers = backend
        if answers is None:
            model = LLM.of(miniature().core, miniature().processor, max_batch=8, kv_memory=64 << 20) if llm is None else llm
            answers = LocalBackend(model, config)
        service = Service(answers, name, config, fetcher=None if fetcher is None else fetcher(config))
        app = App(service, config, Keys(keys), is_sagemaker=is_sagemaker)
        leaving = Leaving()
        found.append(Running(app, port, asyncio.get_running_loop(), leaving))
        await host(app, config, listener, leaving, tell=lambda _: ready.set())

    thread = threading.Thread(target=asyncio.run, args=(whole(),), daemon=True)
    thread.start()
    try:
        assert ready.wait(60), "the server did not start"
        yield found[0]
    finally:
        for _ in range(2):
            if thread.is_alive():
                found[0].loop.call_soon_threadsafe(found[0].leaving.ask)
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@contextmanager
def apart(config: ServerConfig, load: Callable[[], LLM]) -> Iterator[tuple[Server, int]]:
    """Run a server in a process of its own until the block is left; its number comes along."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_apart, args=(config, load, theirs))
    process.start()
    try:
        port: int = ours.recv()
        assert process.pid is not None
        yield Server(port), process.pid
    finally:
        ours.send(None)
        process.join(60)
        assert process.exitcode == 0, "the server did not stop"


def _run_apart(config: ServerConfig, load: Callable[[], LLM], pipe: Connection) -> None:
    llm = load()
    settle()
    with running(config, llm=llm) as server:
        pipe.send(server.port)
        pipe.recv()


def picture(seed: int = 0, width: int = 64, height: int = 64) -> bytes:
    """A small PNG."""
    return to_png(render(draw_scene(random.Random(seed)), width, height))


def data_url(data: bytes, kind: str = "image/png") -> str:
    """A picture as requests carry it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat_body(question: str = "How many things are there?", *urls: str, **fields: Any) -> dict[str, Any]:
    """A request for an answer."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content: Any = [*parts, {"type": "text", "text": question}] if urls else question
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, **fields}
