"""Rows of a JSON file, one at a time.

Owns: JsonRows. Invariants: no more than one row is in memory, whatever the size of the file; nothing stays open, so that any process may
read; a row that is no JSON is that row's fault, a file that is cut off is the file's.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavakit.errors import DataError

__all__ = ["JsonRows"]

_BOM = b"\xef\xbb\xbf"
_JSON_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},"]', re.DOTALL)
"""Strings whole, brackets and commas; a quotation mark alone opens a string that never ends."""


class JsonRows:
    """A JSON list of rows, or a row on each line (.jsonl)."""

    def __init__(self, path: Path) -> None:
        """Find the rows. Raises: DataError for a file that is none, or is cut off."""
        self._path = path
        try:
            with path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
                if path.stat().st_size == 0:
                    raise DataError(f"{path} is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    spans = _lines(data) if path.suffix == ".jsonl" else _elements(data, path)
                    self._spans = array("Q", (place for span in spans for place in span))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if not self._spans:
            raise DataError(f"{path} holds no rows")

    def __len__(self) -> int:
        return len(self._spans) // 2

    def row(self, index: int) -> Any:
        """Read a row. Raises: DataError for one that is no JSON."""
        begin, end = self._spans[2 * index : 2 * index + 2]
        try:
            with self._path.open("rb") as file:
                file.seek(begin)
                data = file.read(end - begin)
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror}") from error
        try:
            return json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"it is no JSON: {error}") from error


def _lines(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Find the lines that hold something."""
    begin = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    while begin < len(data):
        found = data.find(b"\n", begin)
        end = len(data) if found < 0 else found
        if data[begin:end].strip():
            yield begin, end
        begin = end + 1


def _elements(data: mmap.mmap, path: Path) -> Iterator[tuple[int, int]]:
    """Find the elements of a list, which are parsed only when they are asked for. Raises: DataError."""
    begin, depth = 0, 0
    for token in _JSON_TOKENS.finditer(data):
        match token.group():
            case b"[" | b"{" as mark:
                if depth == 0 and (mark != b"[" or data[: token.start()].removeprefix(_BOM).strip() or begin):
                    break
                depth += 1
                begin = token.end() if depth == 1 else begin
            case b"]" | b"}" as mark:
                depth -= 1
                if depth == 0 and (mark == b"}" or data[token.end() :].strip()):
                    break
                if depth == 0 and data[begin : token.start()].strip():
                    yield begin, token.start()
                if depth < 0:
                    break
            case b",":
                if depth == 1:
                    yield begin, token.start()
                    begin = token.end()
            case b'"':
                break
    else:
        if depth == 0 and begin:
            return
    raise DataError(f"{path} must hold one whole JSON list of rows; it is cut off, damaged or something else")
