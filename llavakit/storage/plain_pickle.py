"""Pickle files of plain values, which is how RefCOCO's references are published.

Owns: read_plain_pickle. Invariant: a pickle can only name what it calls, and every name is refused, so no code of the file runs; what is
left are lists, tables, texts and numbers.
"""

from __future__ import annotations

from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any, NoReturn

from llavakit.errors import DataError

__all__ = ["read_plain_pickle"]

# What an unpickler raises for damaged files, besides its own error; found by changing bytes of good ones.
_DAMAGE = (UnpicklingError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError)


class _Plain(Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise UnpicklingError(f"it asks for {module_name}.{global_name}, and only plain values are read")


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of lists, tables, texts and numbers. Raises: DataError for anything else."""
    try:
        with path.open("rb") as file:
            return _Plain(file, encoding="utf-8").load()
    except _DAMAGE as error:
        raise DataError(f"cannot read {path}: {error}") from error
