"""errors.shortened: a long list of problems ends with how many more there are."""

import pytest

from llavakit.errors import shortened


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (2, ["p0", "p1"]), (3, ["p0", "p1", "and 1 more"]), (40, ["p0", "p1", "and 38 more"])]
)
def test_what_is_left_out_is_counted(count: int, expected: list[str]) -> None:
    assert shortened([f"p{index}" for index in range(count)], 2) == expected
