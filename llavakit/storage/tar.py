"""Files inside of tar archives, read where they lie.

Owns: TarFiles and TarMember. Refuses: compressed archives (their files cannot be read one by one) and writing.
Invariant: nothing stays open, so that any process may read.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llavakit.errors import DataError

__all__ = ["TarFiles", "TarMember", "is_archive"]


@dataclass(frozen=True, slots=True)
class TarMember:
    """One file of an archive."""

    name: str
    shard: int
    offset: int
    size: int


class TarFiles:
    """The files of some archives, in their order; each archive's headers are read once."""

    def __init__(self, pattern: str) -> None:
        """Raises: DataError for a pattern that matches nothing, and for what is no whole, uncompressed tar."""
        self.shards = [Path(pattern)] if Path(pattern).is_file() else sorted(map(Path, glob.glob(pattern)))
        if not self.shards:
            raise DataError(f"there is no file {pattern}")
        self.members = [member for number, path in enumerate(self.shards) for member in _members(number, path)]

    def read(self, member: TarMember) -> bytes:
        """Read a file. Raises: DataError where its archive is gone or was cut meanwhile."""
        path = self.shards[member.shard]
        try:
            with path.open("rb") as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != member.size:
            raise DataError(f"{path} was cut after it was opened: {member.name} is not whole")
        return data

    def identity(self) -> list[tuple[str, int, int]]:
        """Return what tells these archives from others: names, sizes and times of change. Raises: DataError."""
        try:
            return [(path.name, (facts := path.stat()).st_size, facts.st_mtime_ns) for path in self.shards]
        except OSError as error:
            raise DataError(f"an archive is gone: {error}") from error


def is_archive(place: str) -> bool:
    """Tell whether a place is an archive, or a pattern of them."""
    return place.endswith(".tar")


def _members(number: int, path: Path) -> Iterator[TarMember]:
    """Read the headers of an archive; a hard link is the file that it links to. Raises: DataError."""
    places: dict[str, tuple[int, int]] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all, a kilobyte each
                name = member.name.removeprefix("./")
                if member.isfile() and not member.issparse():
                    places[name] = member.offset_data, member.size
                    if member.offset_data + member.size > size:
                        raise DataError(f"{path} is cut off within {name}; copy it again")
                elif not member.islnk() or member.linkname.removeprefix("./") not in places:
                    continue
                else:
                    places[name] = places[member.linkname.removeprefix("./")]
                yield TarMember(name, number, *places[name])
            end = archive.offset
        _check_end(path, end)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is no whole, uncompressed tar file: {error}") from error


def _check_end(path: Path, end: int) -> None:
    """Check that an archive ends where its headers do: in zeros alone. Raises: DataError."""
    with path.open("rb") as file:
        file.seek(end)
        is_closed = False
        while part := file.read(1 << 20):
            if part.strip(b"\0"):
                raise DataError(f"{path} is damaged, or several archives in one: there is more behind byte {end}; make it again")
            is_closed = is_closed or len(part) >= tarfile.BLOCKSIZE
    if not is_closed:
        raise DataError(f"{path} is cut off after byte {end}; copy it again")
