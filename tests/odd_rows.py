"""Rows that nobody should write: odd values, and every place of a good row replaced by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["ODD", "Held", "with_one_place_replaced"]

ODD: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "", "<image>", "\0", "\ud800", [], [[]], {}, {"type": "image"}, ["a.png", 3], b"x")


class Held:
    """Rows in memory, as a data set with pictures in it has them."""

    digest = "held"

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def row(self, index: int) -> Any:
        return self.values[index]


def with_one_place_replaced(value: Any, odd: Any) -> Iterator[Any]:
    """Replace each place of a value, one at a time."""
    yield odd
    if isinstance(value, dict):
        for key, part in value.items():
            yield from ({**value, key: other} for other in with_one_place_replaced(part, odd))
            yield {other: value[other] for other in value if other != key}
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from ([*value[:place], other, *value[place + 1 :]] for other in with_one_place_replaced(part, odd))
