"""Folders that appear whole or not at all.

Owns: atomic_folder, atomic_file for a single one, the manifest that is written last, its verification.
Invariant: after a kill at any moment the destination is the old folder or the complete new one; leftovers of dead
processes are removed by the next save of the same folder. Where a file system cannot exchange two folders in one step, a kill
between two renames leaves no folder for a while: the next save puts the old one back first.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from llavakit.errors import StorageError

__all__ = [
    "MANIFEST_NAME",
    "FileEntry",
    "atomic_file",
    "atomic_folder",
    "fsync_folder",
    "manifest_problems",
    "new_folder",
    "read_manifest",
    "remove_unfinished",
]

MANIFEST_NAME = "manifest.json"
_VERSION = 1
_OLD = ".old"
_UNFINISHED = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}(\.old)?")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of one file."""

    num_bytes: int
    sha256: str | None
    """None where the save left it out."""


@contextlib.contextmanager
def atomic_folder(destination: Path, *, overwrite: bool, carry: Callable[[str], bool] | None = None, hashes: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside destination and put it in place when the block ends without an error.

    What the block did not write is kept from the old folder where carry(name) is true of a top-level file or folder; the rest
    is removed. Every file is fsynced, then a manifest with sizes and, unless hashes is False, SHA-256 is written, then the folder is
    renamed.
    Raises: StorageError when destination exists and overwrite is False, when it is the working directory, or when the disk
    refuses; the old folder stays.
    """
    destination = destination.resolve()
    _check_destination(destination, overwrite=overwrite)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        temporary = destination.parent / f"{_prefix(destination)}{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise StorageError(f"cannot write beside {destination}: {error}") from error
    try:
        yield temporary
        if carry is not None and destination.is_dir():
            _carry_over(destination, temporary, carry)
        _write_manifest(temporary, hashes=hashes)
        _put_in_place(temporary, destination, overwrite=overwrite)
        fsync_folder(destination.parent)
    except OSError as error:
        raise StorageError(f"saving {destination} failed: {error}; what was there before is unchanged") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(destination: Path) -> Iterator[TextIO]:
    """Yield a text file beside destination that takes its place, on the disk whole, when the block ends without an error.

    Raises: OSError where the disk refuses; what was there before stays.
    """
    unfinished = destination.with_name(f".{destination.name}.part")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        _fsync_file(unfinished)
        unfinished.replace(destination)
        fsync_folder(destination.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextlib.contextmanager
def new_folder(destination: Path, *, hashes: bool = True) -> Iterator[Path]:
    """Yield as atomic_folder does for a destination that is not there yet, or empty. Raises: StorageError."""
    is_empty = destination.is_dir() and not any(destination.iterdir())
    with atomic_folder(destination, overwrite=is_empty, hashes=hashes) as folder:
        yield folder


def remove_unfinished(parent: Path) -> None:
    """Remove what saves of any folder left unfinished beside them; only for a parent that this process alone writes to."""
    for path in [path for path in parent.iterdir() if _UNFINISHED.fullmatch(path.name)]:
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> Mapping[str, FileEntry] | None:
    """Return the manifest's entries by relative path, or None when the folder has no complete manifest.

    Raises: StorageError when a later version wrote it.
    """
    try:
        values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        version, files = values["version"], dict(values["files"])
        entries = {name: FileEntry(entry["bytes"], entry.get("sha256")) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if version != _VERSION:
        raise StorageError(f"{folder} has a manifest of version {version}, expected {_VERSION}; update llavakit to read it")
    return entries


def manifest_problems(folder: Path, *, check_hashes: bool) -> list[str]:
    """List what differs between a folder and its manifest: missing files, sizes, and with check_hashes their contents."""
    entries = read_manifest(folder)
    if entries is None:
        return [f"{folder} has no complete {MANIFEST_NAME}"]
    problems = []
    for name, entry in entries.items():
        path = folder / name
        if not Path(os.path.normpath(path)).is_relative_to(folder):
            problems.append(f"{name} lies outside the folder")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry.num_bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {entry.num_bytes}")
        elif check_hashes and entry.sha256 is not None and _sha256(path) != entry.sha256:
            problems.append(f"{name} has other contents than when it was saved")
    return problems


def fsync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_destination(destination: Path, *, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise StorageError(f"{destination} is a file; a folder goes there")
    if not overwrite:
        raise StorageError(f"{destination} exists; choose another folder or allow overwriting")
    if Path.cwd().is_relative_to(destination):
        raise StorageError(f"{destination} holds the working directory, which a new folder would pull away; choose a folder inside it")


def _carry_over(old: Path, new: Path, carry: Callable[[str], bool]) -> None:
    for path in old.iterdir():
        target = new / path.name
        if path.name == MANIFEST_NAME or target.exists() or not carry(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(path, target)


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no such links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _write_manifest(folder: Path, *, hashes: bool) -> None:
    files: dict[str, dict[str, object]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sums = {"sha256": _sha256(path)} if hashes else {}
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, **sums}
        _fsync_file(path)
    for child in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(child)
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps({"version": _VERSION, "files": files}, indent=1) + "\n", encoding="utf-8")
    _fsync_file(manifest)
    fsync_folder(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, destination: Path, *, overwrite: bool) -> None:
    if not overwrite or not destination.exists():
        temporary.rename(destination)  # fails where another process put a folder there meanwhile
    elif not _exchange(temporary, destination):
        old = temporary.with_name(temporary.name + _OLD)
        destination.rename(old)
        try:
            temporary.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.tmp-"


def _remove_leftovers(destination: Path) -> None:
    prefix = _prefix(destination)
    for path in [path for path in destination.parent.iterdir() if path.name.startswith(prefix)]:
        owner = path.name.removeprefix(prefix).split("-")[0]
        if not owner.isdigit() or _is_alive(int(owner)):
            continue
        if path.name.endswith(_OLD) and not destination.exists():
            path.rename(destination)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
