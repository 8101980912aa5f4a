"""HTTP/1.1 as uvicorn speaks it, with the limits that it lacks.

Owns: build_protocol. Added: a deadline for the head of a request, an idle connection's first byte included; an end for connections that
are not read from; a status of its own for a head that is too large.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["build_protocol"]

_TOO_LARGE = 431


def build_protocol(header_s: float, write_s: float) -> type[H11Protocol]:
    """Return the protocol of a server that waits so long for a request's head, and for a client to read what it is sent."""

    class Protocol(H11Protocol):
        """One connection."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._deadline: asyncio.TimerHandle | None = None
            self._unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_expecting()
            self._stop_counting()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(write_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop_counting()
            super().resume_writing()

        def data_received(self, data: bytes) -> None:
            if self._deadline is None and self.conn.their_state is h11.IDLE:
                self._expect_head()
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_expecting()

        def send_400_response(self, msg: str) -> None:
            error, status = sys.exception(), 400
            if isinstance(error, h11.RemoteProtocolError):
                status = error.error_status_hint
                error.__traceback__ = None  # a frame of h11's holds the error, and others the bytes that came
            if status != _TOO_LARGE or self.conn.our_state is not h11.IDLE:
                super().send_400_response(msg)
                return
            text = b"the head of the request is too large"
            headers = [("content-type", "text/plain"), ("content-length", str(len(text))), ("connection", "close")]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=text), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _expect_head(self) -> None:
            self._deadline = self.loop.call_later(header_s, self._too_slow)

        def _stop_expecting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _stop_counting(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _too_slow(self) -> None:
            self._deadline = None
            self.transport.close()

    return Protocol
