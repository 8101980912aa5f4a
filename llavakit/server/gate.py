"""How many requests at once, and whose.

Owns: Gate. Invariant: whoever is let in leaves again, whatever happens; whoever is not is told so before its body is read.
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

__all__ = ["Gate"]

_MINUTE_S = 60.0
_MOST_RETRY_S = 5


class Gate:
    """Lets requests in, up to as many as may run and wait."""

    def __init__(self, config: ServerConfig, *, most: int, has_keys: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Most is how many requests may be inside."""
        self._config, self._most, self._has_keys = config, most, has_keys
        self._inside: defaultdict[str, int] = defaultdict(int)
        per_minute = config.requests_per_minute
        told = f"a key may send {per_minute} requests a minute"
        self._allowance = Allowance(per_minute, per_minute / _MINUTE_S, told, clock) if per_minute else None
        self.num_inside = 0
        self.is_draining = False

    @contextlib.contextmanager
    def enter(self, caller: Caller) -> Iterator[None]:
        """Let one request in. Raises: HttpError (503, 429)."""
        if self.is_draining:
            raise HttpError(503, "shutting_down", "the server is shutting down", retry_s=_MOST_RETRY_S)
        if self._has_keys and self._inside[caller.name] >= self._config.max_per_key:
            raise HttpError(429, "rate_limit_exceeded", f"a key may have {self._config.max_per_key} requests at a time", retry_s=_retry_s())
        if self.num_inside >= self._most:
            raise HttpError(503, "overloaded", "the server has too much to do; try again later", retry_s=_retry_s())
        if self._allowance is not None:
            self._allowance.take(caller.name)
        self.num_inside += 1
        self._inside[caller.name] += 1
        try:
            yield
        finally:
            self.num_inside -= 1
            self._inside[caller.name] -= 1
            if not self._inside[caller.name]:
                del self._inside[caller.name]


def _retry_s() -> int:
    """Spread those who come back."""
    return random.randint(1, _MOST_RETRY_S)
