"""Files inside of archives: the bytes that were put there, and what is no whole archive."""

import io
import tarfile
from pathlib import Path

import pytest

from llavakit.errors import DataError
from llavakit.storage.tar import TarFiles, is_archive


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_files_are_read_where_they_lie(tmp_path: Path, form: int) -> None:
    files = {"a.jpg": b"1", "./deep/b.png": b"2" * 1000, ("n" * 120 if form != tarfile.USTAR_FORMAT else "n") + ".txt": b"", "ü.txt": b"x"}
    write_tar(tmp_path / "0.tar", files, form)
    write_tar(tmp_path / "1.tar", {"c": b"3"}, form)
    found = TarFiles(str(tmp_path / "*.tar"))
    assert [found.read(member) for member in found.members] == [*files.values(), b"3"]
    assert [member.name for member in found.members] == [*(name.removeprefix("./") for name in files), "c"]


def test_links_and_folders_are_no_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert TarFiles(str(tmp_path / "a.tar")).members == []


def test_what_is_no_whole_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        TarFiles(str(tmp_path / "gone-*.tar"))
    packed = write_tar(tmp_path / "packed.tar", {"a": b"1"}, mode="w:gz")
    with pytest.raises(DataError, match="no whole, uncompressed tar"):
        TarFiles(str(packed))
    whole = write_tar(tmp_path / "whole.tar", {"a": b"1" * 3000})
    opened = TarFiles(str(whole))
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(DataError, match="was cut after"):
        opened.read(opened.members[0])
    with pytest.raises(DataError, match=r"cut off|no whole"):
        TarFiles(str(whole))


def test_archives_are_known_by_their_name() -> None:
    assert is_archive("shards/00*.tar")
    assert not is_archive("pictures")
