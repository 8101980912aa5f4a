"""Where the pictures are that rows name: a folder, or shards of tar.

Owns: Pictures, open_pictures, picture_bytes, picture_grids. Refuses: URLs, and pictures outside the folder.
Invariant: nothing stays open, so that any process may read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from llavakit.errors import ImageError
from llavakit.geometry import ImageGrid
from llavakit.processing.decode import DEFAULT_LIMITS, image_size
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.storage.tar import TarFiles, TarMember, is_archive
from llavakit.training.checks import FaultError

__all__ = ["Picture", "PictureFolder", "PictureShards", "Pictures", "open_pictures", "picture_bytes", "picture_grids"]

Picture = str | bytes
"""A picture as a row has it: by name, or whole."""


class Pictures(Protocol):
    """Pictures by name."""

    def read(self, name: str) -> bytes:
        """Read a picture's file. Raises: FaultError for one that is not there, ImageError for one that is too large."""
        ...

    @property
    def digest(self) -> str:
        """Tell these pictures from others, as far as that is known without reading them."""
        ...


def open_pictures(place: str | Path | None) -> Pictures:
    """Open a folder, or shards of tar (a file, or a pattern like shards/*.tar); None is the current folder. Raises: DataError."""
    if place is not None and is_archive(str(place)):
        return PictureShards(TarFiles(str(place)))
    return PictureFolder(Path("." if place is None else place))


def picture_bytes(pictures: Pictures, wanted: Sequence[Picture]) -> list[bytes]:
    """Read the pictures of a row, those that it does not hold itself. Raises: FaultError, ImageError."""
    return [picture if isinstance(picture, bytes) else pictures.read(picture) for picture in wanted]


def picture_grids(pictures: Pictures, wanted: Sequence[Picture], processor: LlavaProcessor | TextProcessor) -> list[ImageGrid]:
    """Return the image tokens of a row's pictures, of which the headers are read. Raises: FaultError, ImageError naming the picture."""
    if not wanted:
        return []
    if isinstance(processor, TextProcessor):
        raise ImageError("it has a picture, and the model is a language model without a vision tower")
    sizes, num_pixels = [], 0
    for place, (picture, data) in enumerate(zip(wanted, picture_bytes(pictures, wanted), strict=True), 1):
        try:
            size = image_size(data, processor.limits)
        except ImageError as error:
            name = f"{place} of the row" if isinstance(picture, bytes) else repr(picture)
            raise type(error)(f"picture {name}: {error}") from error
        num_pixels += size[0] * size[1]
        if num_pixels > (most := processor.limits.max_total_pixels):
            raise ImageError(f"its pictures have more than {most} pixels together; scale them down")
        sizes.append(size)
    return processor.grids(sizes)


class PictureFolder:
    """The pictures of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    @property
    def digest(self) -> str:
        """Files of a folder may change at any time; whoever keeps what was found asks again of those that were not right."""
        return str(self._folder)

    def read(self, name: str) -> bytes:
        """Read a picture's file. Raises: FaultError for one that is not in the folder; links inside of it may lead anywhere."""
        try:
            path = Path(os.path.normpath(self._folder / name))
            if not path.is_relative_to(self._folder):
                raise FaultError("missing picture", f"picture {name!r} lies outside the picture folder")
            if path.exists() and not path.is_file():
                raise FaultError("missing picture", f"picture {name!r} is no file")
            _check_size(name, path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise FaultError("missing picture", f"cannot read picture {name!r}: {error.strerror}") from error
        except ValueError as error:  # a name may hold a zero byte
            raise FaultError("missing picture", f"cannot read picture {name!r}: {error}") from error


class PictureShards:
    """The pictures of some archives, by the names that they have there."""

    def __init__(self, files: TarFiles) -> None:
        self._files = files
        self._members: dict[str, TarMember | None] = {}
        for member in files.members:
            self._members[member.name] = None if member.name in self._members else member

    @property
    def digest(self) -> str:
        """The archives' names, sizes and times."""
        return repr(self._files.identity())

    def read(self, name: str) -> bytes:
        """Read a picture. Raises: FaultError where none or several have the name."""
        member = self._members.get(name.removeprefix("./"))
        if member is None:
            problem = "several files of that name" if name in self._members else "no such file"
            raise FaultError("missing picture", f"cannot read picture {name!r}: the archives hold {problem}")
        _check_size(name, member.size)
        return self._files.read(member)


def _check_size(name: str, num_bytes: int) -> None:
    """Refuse a file before it is read. Raises: ImageError."""
    if num_bytes > DEFAULT_LIMITS.max_bytes:
        raise ImageError(f"picture {name!r} has {num_bytes} bytes, at most {DEFAULT_LIMITS.max_bytes} are allowed; compress it")
