"""JSON as a request may have it: one meaning, bounded nesting and size, finite numbers.

Owns: parse_json. Refuses: duplicate keys, NaN and infinities, halves of surrogate pairs, numbers of more digits than fit, deep nesting,
more values than allowed (empty lists take thirty times their bytes), anything that is no UTF-8.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from llavakit.server.faults import HttpError

__all__ = ["parse_json"]

_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:]', re.DOTALL)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_MOST_DIGITS = 32


def parse_json(data: bytes, *, max_depth: int, max_marks: int) -> Any:
    """Parse a body. Raises: HttpError (400)."""
    _check_shape(data, max_depth, max_marks)
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_table, parse_constant=_no_number, parse_int=_integer, parse_float=_number
        )
        if b"\\u" in data and _HALF.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _invalid("the body is no valid JSON in UTF-8") from error
    return value


def _check_shape(data: bytes, max_depth: int, max_marks: int) -> None:
    depth = 0
    for count, token in enumerate(_TOKENS.finditer(data)):
        if (mark := data[token.start()]) in b"[{":
            depth += 1
            if depth > max_depth:
                raise _invalid(f"the body's JSON is nested deeper than {max_depth}")
        elif mark in b"]}":
            depth -= 1
        if count >= max_marks:
            raise _invalid(f"the body's JSON has more than {max_marks} texts, brackets, commas and colons")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key comes twice")
    return values


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError("too many digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _invalid(message: str) -> HttpError:
    return HttpError(400, "invalid_json", message)
