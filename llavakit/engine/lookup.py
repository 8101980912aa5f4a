"""Guessing what follows from what was there before: prompt lookup, a speculation that costs no second model.

Owns: Lookup. The guesses are verified by the model in one pass with the token before them, so answers do not change.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Lookup"]

_LENGTHS = (4, 3, 2)


class Lookup:
    """The n-grams of one growing sequence, and where each was seen last."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], int] = {}
        self._num_known = 0

    def guess(self, ids: Sequence[int], count: int, num_ids: int) -> list[int]:
        """Guess at most count ids that follow: those that followed the longest of its last n-grams before. ids only ever grow."""
        for stop in range(self._num_known, len(ids)):
            for length in _LENGTHS:
                if stop >= length:
                    self._seen[tuple(ids[stop - length : stop])] = stop
        self._num_known = len(ids)
        guessed: list[int] = []
        for length in _LENGTHS:
            place = self._seen.get(tuple(ids[-length:])) if len(ids) >= length else None
            if place is not None:
                guessed = list(ids[place : place + count])
                break
        # Places of pictures hold ids that are no tokens.
        bad = next((index for index, token in enumerate(guessed) if not 0 <= token < num_ids), len(guessed))
        return guessed[:bad]
