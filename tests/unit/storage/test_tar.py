"""Files inside of archives: the bytes that were put there, and what is no whole archive."""

import io
import random
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


def test_a_hard_link_is_the_file_that_it_links_to(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a", "./a")
        archive.add(tmp_path / "b", "./b")
    found = TarFiles(str(tmp_path / "x.tar"))
    assert [(member.name, found.read(member)) for member in found.members] == [("a", b"12345"), ("b", b"12345")]


def test_a_damaged_archive_is_never_a_shorter_one(tmp_path: Path) -> None:
    files = {f"{n}.txt": bytes([n]) * 700 for n in range(6)}
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    damages = [whole[:512], whole[: 3 * 1536], whole[: 3 * 1536 + 100], whole + whole, whole[:1536] + b"\0" * 1536 + whole[3072:]]
    damages += [whole[: 1536 + 148] + b"777777" + whole[1536 + 154 :]]
    for number, data in enumerate(damages):
        (tmp_path / f"{number}.tar").write_bytes(data)
        with pytest.raises(DataError):
            TarFiles(str(tmp_path / f"{number}.tar"))
    (tmp_path / "padded.tar").write_bytes(whole + b"\0" * 5000)
    assert len(TarFiles(str(tmp_path / "padded.tar")).members) == 6


def test_changed_headers_raise_our_error_or_are_read(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {f"{n}.txt": b"x" for n in range(3)}).read_bytes()
    rng = random.Random(0)
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(3) * 1024 + rng.randrange(512)] = rng.randrange(256)
        (tmp_path / "x.tar").write_bytes(data)
        try:
            TarFiles(str(tmp_path / "x.tar"))
        except DataError:
            continue


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
