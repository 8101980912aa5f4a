"""Rows as they lie in files: JSON lists, JSON lines, tar shards, and whatever the package datasets opens.

Owns: Rows and open_rows. Refuses: what a row means (forms).
Invariants: no more than one row is in memory at a time, whatever the size of the file; nothing stays open, so that any process may read;
a row that is no JSON is that row's fault, a file that is cut off is the file's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from llavakit.errors import DataError
from llavakit.logs import logger
from llavakit.processing.decode import SUFFIXES
from llavakit.storage.json_rows import JsonRows
from llavakit.storage.tar import TarFiles, TarMember, is_archive
from llavakit.training.checks import FaultError

__all__ = ["Rows", "open_rows"]

_LOG = logger("training")
_NAMED = ("image", "images", "image_path")
_TALKS = frozenset(("conversations", "messages", "texts", "text", "chosen"))
_NUMBER = re.compile(r"\d{0,9}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Rows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """Read a row as JSON has it, pictures that it holds as bytes. Raises: FaultError for one that is no JSON."""
        ...

    @property
    def digest(self) -> str:
        """Tell these rows from others."""
        ...


def open_rows(name: str | Path, *, subset: str | None = None, split: str = "train") -> Rows:
    """Open a file of rows (.json, .jsonl, .parquet, .tar or a pattern of them), a folder, or a data set of the hub.

    subset and split say which part of a data set is meant. Raises: DataError.
    """
    place, path = str(name), Path(name)
    if is_archive(place):
        return _TarRows(place)
    if path.suffix in (".json", ".jsonl"):
        return JsonRows(path)
    if path.exists() or path.suffix == ".parquet" or _HUB_ID.fullmatch(place):
        return _DatasetRows(place, subset, split)
    raise DataError(f"there is no file or folder {place}; rows are .json, .jsonl, .parquet, .tar, a folder, or a hub id like owner/name")


class _TarRows:
    """Web datasets: files of a shard with one name up to the first dot are a row: its pictures, and .json, or .txt, which is a caption."""

    def __init__(self, pattern: str) -> None:
        self._files = TarFiles(pattern)
        groups: dict[tuple[int, str], list[TarMember]] = {}
        for member in self._files.members:
            if not PurePosixPath(member.name).name.startswith("."):  # what systems add beside files
                groups.setdefault((member.shard, _key(member)), []).append(member)
        self._rows = [members for members in groups.values() if {"json", "txt"} & {_kind(member) for member in members}]
        if not self._rows:
            raise DataError(f"{pattern} holds no rows: files like 7.jpg and 7.json, or 7.txt")
        if num_others := len(groups) - len(self._rows):
            _LOG.warning("%s: %d groups of files have neither .json nor .txt and are no rows", pattern, num_others)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._files.identity()).encode()).hexdigest()

    def row(self, index: int) -> Any:
        by_kind = {_kind(member): member for member in self._rows[index]}
        value = self._table(by_kind["json"]) if "json" in by_kind else None
        pictures = [self._files.read(member) for member in _pictures(self._rows[index], value)]
        if "txt" in by_kind and not (isinstance(value, dict) and _TALKS & value.keys()):
            if not pictures:
                raise FaultError("missing picture", "a caption has no picture beside it")
            caption = self._files.read(by_kind["txt"]).decode("utf-8", errors="replace").strip()
            turns = [{"from": "human", "value": "<image>" * len(pictures)}, {"from": "gpt", "value": caption}]
            return {"id": _key(self._rows[index][0]), "image": pictures, "conversations": turns}
        if not pictures or not isinstance(value, dict):
            return value
        return {**{key: part for key, part in value.items() if key not in _NAMED}, "image": pictures}

    def _table(self, member: TarMember) -> Any:
        try:
            return json.loads(self._files.read(member).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise FaultError("form", f"its .json is no JSON: {error}") from error


def _key(member: TarMember) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.split(".", 1)[0]))


def _kind(member: TarMember) -> str:
    """Return what follows the first dot of a file's name."""
    return PurePosixPath(member.name).name.partition(".")[2].lower()


def _pictures(members: Sequence[TarMember], value: Any) -> list[TarMember]:
    """Choose a row's pictures: those that it names, in its order, or else those without a name of their own, numbers in order."""
    found = [member for member in members if PurePosixPath(member.name).suffix.lower() in SUFFIXES]
    by_name = {PurePosixPath(member.name).name: member for member in found}
    named = next((value[key] for key in _NAMED if value.get(key) is not None), None) if isinstance(value, dict) else None
    names = [PurePosixPath(name).name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    if names and all(name in by_name for name in names):
        return [by_name[name] for name in names]
    plain = [member for member in found if _NUMBER.fullmatch(_kind(member).rpartition(".")[0])]
    return sorted(plain, key=lambda member: int(_kind(member).rpartition(".")[0] or -1))


class _DatasetRows:
    """What the package datasets opens: Parquet and other files, folders of them, and data sets of the hub."""

    def __init__(self, name: str, subset: str | None, split: str) -> None:
        self._dataset = _open_dataset(name, subset, split).with_format("arrow")
        if not len(self._dataset):
            raise DataError(f"{name} holds no rows")

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def digest(self) -> str:
        return str(self._dataset._fingerprint)  # what datasets itself keeps its caches by; it has no public name

    def row(self, index: int) -> Any:
        return _plain(self._dataset[index].to_pylist()[0])


def _open_dataset(name: str, subset: str | None, split: str) -> Any:
    """Open one split. Raises: DataError with what datasets says."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {name} needs the package datasets: pip install 'llavakit[data]'") from error
    path = Path(name)
    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            found = datasets.load_from_disk(name)
            if not isinstance(found, Mapping) and found.split is not None and str(found.split) != split:
                raise ValueError(f"it is the split {found.split}")
            return found[split] if isinstance(found, Mapping) else found
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=name, split=split)
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot open {name} as a data set (subset {subset}, split {split}): {error}") from error


def _plain(value: Any) -> Any:
    """Turn pictures as datasets keep them, tables of bytes and path, into what rows have: bytes, or a name."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
