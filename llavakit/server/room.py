"""Room for so much at a time.

Owns: Room. Invariant: who finds none waits, and in turn; who stops waiting leaves no trace.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

__all__ = ["Room"]


class Room:
    """Room for amounts that add up to most."""

    def __init__(self, most: int) -> None:
        self._most, self.used = most, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def of(self, amount: int) -> AsyncIterator[None]:
        """Have room for an amount, at most all there is, while the block runs; nothing needs no room."""
        if amount:
            await self._enter(amount)
        try:
            yield
        finally:
            self._leave(amount)

    async def _enter(self, amount: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._admit()
            else:  # its turn came at the same moment
                self._leave(amount)
            raise

    def _leave(self, amount: int) -> None:
        self.used -= amount
        self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self.used + self._waiting[0][0] <= self._most):
            amount, turn = self._waiting.popleft()
            if not turn.cancelled():
                self.used += amount
                turn.set_result(None)
