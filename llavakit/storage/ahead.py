"""Reading ahead: what comes next is prepared while what came is used.

Owns: read_ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

__all__ = ["read_ahead"]

_T = TypeVar("_T")


def read_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Yield items in order; the one after is prepared by a thread meanwhile. What preparing raises is raised in its turn."""
    end = object()
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        following = thread.submit(next, items, cast("_T", end))
        while (item := following.result()) is not end:
            following = thread.submit(next, items, cast("_T", end))
            yield item
