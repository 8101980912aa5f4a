"""A server from its start to its end.

Owns: serve and its parts settle, host and Leaving: memory, uvicorn, signals. Invariant: SIGTERM and Ctrl-C let those inside finish, a
second one does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from llavakit.logs import logger
from llavakit.server.app import App
from llavakit.server.backend import Backend
from llavakit.server.config import ServerConfig
from llavakit.server.http import build_protocol
from llavakit.server.keys import Keys
from llavakit.server.service import Service

__all__ = ["Leaving", "host", "serve", "settle"]

_LOG = logger("server")
_BACKLOG = 2048
_M_MMAP_THRESHOLD = -3  # of malloc.h


def serve(
    backend: Backend,
    name: str,
    config: ServerConfig,
    keys: Keys,
    listener: socket.socket,
    *,
    is_sagemaker: bool = False,
    tell: Callable[[str], object] = _LOG.info,
) -> None:
    """Serve until the process is told to stop; tell hears the address once requests are taken."""
    settle()

    async def run() -> None:
        app = App(Service(backend, name, config), config, keys, is_sagemaker=is_sagemaker)
        leaving = Leaving()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, leaving.ask)
        await host(app, config, listener, leaving, tell=tell)

    asyncio.run(run())


def settle() -> None:
    """Prepare a process that has loaded its model for a long life."""
    gc.collect()
    gc.freeze()  # looking through what stays for garbage would stop everything for 50 ms, again and again
    with contextlib.suppress(OSError, AttributeError):
        # glibc learns to keep blocks of up to 32 MB in its heap, where small ones between them keep it from giving anything back.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class Leaving:
    """Whether a server is to stop: asked once it lets those inside finish, asked again it does not."""

    def __init__(self) -> None:
        self.asked, self.insisted = asyncio.Event(), asyncio.Event()

    def ask(self) -> None:
        """Ask the server to stop."""
        (self.insisted if self.asked.is_set() else self.asked).set()


async def host(app: App, config: ServerConfig, listener: socket.socket, leaving: Leaving, *, tell: Callable[[str], object]) -> None:
    """Run an application on a socket until it is to leave."""
    server = _Server(
        uvicorn.Config(
            app,
            http=build_protocol(config.header_s, config.write_s),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="critical",  # what it tells is told by the application, without text of requests
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=max(1, round(config.keep_alive_s)),
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=config.max_header_bytes,
        )
    )
    asyncio.get_running_loop().set_exception_handler(_LoopFaults())
    listener.listen(_BACKLOG)
    serving = asyncio.ensure_future(server.serve([listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    address, port = listener.getsockname()[:2]
    tell(f"http://{f'[{address}]' if ':' in address else address}:{port}")
    asked = asyncio.ensure_future(leaving.asked.wait())
    await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
    draining, insisted = asyncio.ensure_future(app.drain()), asyncio.ensure_future(leaving.insisted.wait())
    await asyncio.wait((draining, insisted), return_when=asyncio.FIRST_COMPLETED)
    for task in (asked, draining, insisted):
        task.cancel()
    server.should_exit = True
    await serving


class _LoopFaults:
    """Tells what the event loop could not do, once a second at most: without file descriptors it fails thousands of times in that."""

    def __init__(self) -> None:
        self._told_at, self._untold = -math.inf, 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._untold += 1
        if loop.time() < self._told_at + 1:
            return
        _LOG.error("the event loop failed", exc_info=context.get("exception"), extra={"fields": {"times": self._untold}})
        self._told_at, self._untold = loop.time(), 0


class _Server(uvicorn.Server):
    """A server whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield
