"""Prompt lookup: what followed the last words before is guessed, and nothing that is no token."""

from llavakit.engine.lookup import Lookup


def test_what_followed_the_longest_match_is_guessed() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 1, 2, 3, 4], 3, 100) == [5, 6, 9]
    assert lookup.guess([1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 1, 2, 3, 4, 8, 3, 4], 3, 100) == [8, 3, 4]


def test_nothing_is_guessed_where_nothing_came_before() -> None:
    assert Lookup().guess([1, 2, 3], 4, 100) == []
    assert Lookup().guess([], 4, 100) == []


def test_a_guess_ends_before_what_is_no_token() -> None:
    assert Lookup().guess([1, 2, 3, 101, 4, 1, 2], 4, 100) == [3]
    assert Lookup().guess([1, 2, -200, 4, 1, 2], 4, 100) == []
