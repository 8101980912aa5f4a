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
        """Return what tells these archives from others: names, sizes and times of change."""
        return [(path.name, (facts := path.stat()).st_size, facts.st_mtime_ns) for path in self.shards]


def is_archive(place: str) -> bool:
    """Tell whether a place is an archive, or a pattern of them."""
    return place.endswith(".tar")


def _members(number: int, path: Path) -> Iterator[TarMember]:
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all, a kilobyte each
                if not member.isfile() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"{path} is cut off within {member.name}; copy it again")
                yield TarMember(member.name.removeprefix("./"), number, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} is no whole, uncompressed tar file: {error}") from error
