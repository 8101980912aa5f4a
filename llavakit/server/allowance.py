"""So many a while for each of those who ask.

Owns: Allowance. Invariant: memory and time are bounded, whoever asks: of too many, those who have taken nothing for longest are forgotten.
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
        now = self._clock()
        left, then = self._left.get(name, (self._most, now))
        left = min(self._most, left + (now - then) * self._rate_s)
        if left < 1:
            raise HttpError(429, "rate_limit_exceeded", self._told, retry_s=int((1 - left) / self._rate_s) + 1)
        self._left.pop(name, None)
        self._left[name] = (left - 1, now)  # the last of all
        if len(self._left) > _MOST_NAMES:
            del self._left[next(iter(self._left))]
