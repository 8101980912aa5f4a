"""How many requests at once, and whose.

Owns: Gate and Inside. Invariant: whoever is let in leaves again, whatever happens, and what it held is free;
whoever is not is told so before its body is read.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from llavakit.server.allowance import Allowance
from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.keys import Caller
from llavakit.server.room import Room

__all__ = ["Gate", "Inside"]

_MINUTE_S = 60.0
_MOST_RETRY_S = 5


class Inside:
    """A request that was let in, and the bytes that it holds."""

    def __init__(self, gate: Gate, caller: Caller) -> None:
        self._gate, self.caller, self.num_bytes = gate, caller, 0
        self.parsing = gate.parsing

    def take(self, num_bytes: int) -> None:
        """Hold so many bytes more, until the request leaves. Raises: HttpError (503)."""
        self._gate.hold(num_bytes)
        self.num_bytes += num_bytes


class Gate:
    """Lets requests in, up to as many as may run and wait."""

    def __init__(self, config: ServerConfig, *, most: int, has_keys: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Most is how many requests may be inside."""
        self._config, self._most, self._has_keys = config, most, has_keys
        self._inside: defaultdict[str, int] = defaultdict(int)
        per_minute = config.requests_per_minute
        told = f"a key may send {per_minute} requests a minute"
        self._allowance = Allowance(per_minute, per_minute / _MINUTE_S, told, clock) if per_minute else None
        self.parsing = Room(1)
        """Of those whose bodies are long, one is parsed at a time."""
        self.num_inside = self.num_bytes = 0
        self.is_draining = False

    @contextlib.contextmanager
    def enter(self, caller: Caller) -> Iterator[Inside]:
        """Let one request in. Raises: HttpError (503, 429)."""
        if self.is_draining:
            raise HttpError(503, "shutting_down", "the server is shutting down", retry_s=_MOST_RETRY_S)
        if self._has_keys and self._inside[caller.name] >= self._config.max_per_key:
            raise HttpError(429, "rate_limit_exceeded", f"a key may have {self._config.max_per_key} requests at a time", retry_s=_retry_s())
        if self.num_inside >= self._most:
            raise _overloaded()
        if self._allowance is not None:
            self._allowance.take(caller.name)
        self.num_inside += 1
        self._inside[caller.name] += 1
        inside = Inside(self, caller)
        try:
            yield inside
        finally:
            self.num_inside -= 1
            self.num_bytes -= inside.num_bytes
            self._inside[caller.name] -= 1
            if not self._inside[caller.name]:
                del self._inside[caller.name]

    def hold(self, num_bytes: int) -> None:
        """Count bytes that a request holds. Raises: HttpError (503) where there is no memory for them."""
        if self.num_bytes + num_bytes > self._config.max_held_bytes:
            raise _overloaded()
        self.num_bytes += num_bytes


def _overloaded() -> HttpError:
    return HttpError(503, "overloaded", "the server has too much to do; try again later", retry_s=_retry_s())


def _retry_s() -> int:
    """Spread those who come back."""
    return random.randint(1, _MOST_RETRY_S)
