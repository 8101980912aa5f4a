"""Small JSON and text files of a checkpoint folder.

Owns: reading them with limits and clear errors. Refuses: duplicate keys, files over 64 MiB, JSON that is not a table.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llavakit.errors import CheckpointError

__all__ = ["json_bytes", "parse_json", "read_json", "read_optional_json", "read_text", "write_json"]

_MAX_BYTES = 64 << 20


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises: CheckpointError when it is missing, too large or not UTF-8."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON table. Raises: CheckpointError when it is missing, not JSON, or not a table."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON table; source names it in errors. Raises: CheckpointError when it is not one, or a key occurs twice."""
    try:
        values = json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, source))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{source} must hold a JSON table, got {type(values).__name__}")
    return values


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON table, or return an empty one when there is no such file."""
    return read_json(path) if path.is_file() else {}


def json_bytes(values: Any) -> bytes:
    """Return indented JSON in UTF-8 with a final newline."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, values: Any) -> None:
    """Write json_bytes to a file."""
    path.write_bytes(json_bytes(values))


def _no_duplicates(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = sorted(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise CheckpointError(f"{source} has the key {keys[0]!r} twice")
    return values
