"""So many a while for each of those who ask.

Owns: Allowance. Invariant: memory is bounded, whoever asks: those who have all they may have are forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llavakit.server.faults import HttpError

__all__ = ["Allowance"]

_MOST_NAMES = 4096


class Allowance:
    """Gives everyone most at first, and rate_s more a second of what they have used."""

    def __init__(self, most: float, rate_s: float, told: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Told is what those hear who have nothing left."""
        self._most, self._rate_s, self._told, self._clock = most, rate_s, told, clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> None:
        """Take one. Raises: HttpError (429), which says when there is one again."""
        left = self._now(name)
        if left < 1:
            raise HttpError(429, "rate_limit_exceeded", self._told, retry_s=int((1 - left) / self._rate_s) + 1)
        if name not in self._left and len(self._left) >= _MOST_NAMES:
            self._forget()
        self._left[name] = (left - 1, self._clock())

    def _now(self, name: str) -> float:
        now = self._clock()
        left, then = self._left.get(name, (self._most, now))
        return min(self._most, left + (now - then) * self._rate_s)

    def _forget(self) -> None:
        """Forget those who have everything again, and if nobody has, the one who came first."""
        self._left = {name: found for name, found in self._left.items() if self._now(name) < self._most}
        while len(self._left) >= _MOST_NAMES:
            del self._left[next(iter(self._left))]
