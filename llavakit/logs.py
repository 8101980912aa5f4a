"""Loggers of the package, silent until an application configures logging.

Owns: the names under "llavakit", and the two ways to write records: lines for people, JSON for machines. A record may carry fields
(extra={"fields": {...}}). Refuses: handlers and basicConfig at import; the command line attaches one with show_logs.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal

__all__ = ["logger", "show_logs"]

_ROOT = "llavakit"
_MOST_CHARS = 1024


def logger(name: str) -> logging.Logger:
    """Return the logger of one part of the package, named by its folder."""
    return logging.getLogger(f"{_ROOT}.{name}")


def show_logs(level: int = logging.INFO, *, form: Literal["lines", "json"] = "lines") -> None:
    """Write the package's records to stderr, one line each; calling it again only changes the level."""
    root = logging.getLogger(_ROOT)
    root.setLevel(level)
    if not root.handlers:
        handler = _Handler(sys.stderr)
        handler.setFormatter(_Json() if form == "json" else logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes records, and goes on where they cannot be written: a full disk or a closed pipe ends no server."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing."""


class _Json(logging.Formatter):
    """One JSON object a record: nothing in it can begin a line or move a cursor."""

    def format(self, record: logging.LogRecord) -> str:
        values = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        values |= record.__dict__.get("fields", {})
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)[-4 * _MOST_CHARS :]
        shown = {name: value[:_MOST_CHARS] if isinstance(value, str) and name != "error" else value for name, value in values.items()}
        return json.dumps(shown)
