"""storage.ahead: items in order, one prepared ahead by another thread."""

import threading
from collections.abc import Iterator

import pytest

from llavakit.storage.ahead import read_ahead


def test_items_come_in_order() -> None:
    assert list(read_ahead(iter(range(50)))) == list(range(50))
    assert list(read_ahead(iter([None, None]))) == [None, None]
    assert list(read_ahead(iter(()))) == []


def test_the_next_item_is_prepared_while_one_is_used() -> None:
    prepared = [threading.Event() for _ in range(3)]

    def items() -> Iterator[str]:
        for event in prepared:
            event.set()
            yield threading.current_thread().name

    ahead = read_ahead(items())
    name = next(ahead)
    assert name != threading.current_thread().name
    assert prepared[1].wait(10)
    assert not prepared[2].is_set()  # one at most
    ahead.close()  # type: ignore[attr-defined]  # a generator


def test_what_preparing_raises_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("no third")

    ahead = read_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="no third"):
        next(ahead)
