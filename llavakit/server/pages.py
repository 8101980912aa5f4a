"""The files of the page, in memory.

Owns: PAGES. Invariant: what is served is this table; no path of a request ever becomes a path of the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "Page"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file."""

    data: bytes
    kind: str
    headers: tuple[tuple[bytes, bytes], ...]


def _read() -> Mapping[str, Page]:
    folder = Path(__file__).parent / "page"
    headers = ((b"content-security-policy", _POLICY.encode()), (b"cache-control", b"no-cache"))
    return {path: Page((folder / name).read_bytes(), kind, headers) for path, (name, kind) in _FILES.items()}


PAGES = _read()
"""Files by path."""
