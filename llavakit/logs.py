"""Loggers of the package, silent until an application configures logging.

Owns: the names under "llavakit". Refuses: handlers and basicConfig at import; the command line attaches one with show_logs.
"""

from __future__ import annotations

import logging
import sys

__all__ = ["logger", "show_logs"]

_ROOT = "llavakit"


def logger(name: str) -> logging.Logger:
    """Return the logger of one part of the package, named by its folder."""
    return logging.getLogger(f"{_ROOT}.{name}")


def show_logs(level: int = logging.INFO) -> None:
    """Write the package's records to stderr, one line each; calling it again only changes the level."""
    root = logging.getLogger(_ROOT)
    root.setLevel(level)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
