"""Files of pictures that a user names.

Owns: read_picture. Refuses: opening what is read (processing).
"""

from __future__ import annotations

from pathlib import Path

from llavakit.errors import ImageError

__all__ = ["read_picture"]

_MAX_BYTES = 64 << 20


def read_picture(path: Path) -> bytes:
    """Read a picture's file. Raises: ImageError when it is no regular file, too large, or unreadable."""
    try:
        if not path.exists():
            raise ImageError(f"there is no picture {path}")
        if not path.is_file():
            raise ImageError(f"{path} is not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ImageError(f"{path} is larger than {_MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
