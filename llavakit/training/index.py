"""What is known of every row before the first step: its tokens, what is learned of it, its tiles, and what is wrong with it.

Owns: SampleIndex and building it: by several processes, in chunks that are kept, so that an interrupted build goes on where it was.
Invariant: an index is a pure function of what its key is made of; one with another key is built anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import shutil
import signal
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llavakit.errors import TrainingError
from llavakit.logs import logger
from llavakit.storage.documents import read_json, write_json
from llavakit.storage.folder import atomic_folder, manifest_problems
from llavakit.storage.tensors import TensorFolder, write_tensors
from llavakit.training.checks import Fault, Measures, duplicate_ids

__all__ = ["Measurable", "SampleIndex", "build_index", "index_key", "load_index"]

_LOG = logger("training")
_CHUNK_ROWS = 2048
_KEY_FILE, _PROBLEMS_FILE = "key.json", "problems.jsonl"
_COLUMNS = ("num_tokens", "num_supervised", "num_tiles")
_LOG_EVERY_S = 10.0
_NO_SPLIT = 1 << 62


class Measurable(Protocol):
    """Rows that can be measured without decoding a picture."""

    def __len__(self) -> int: ...

    def measure(self, index: int) -> Measures:
        """Measure one row; whatever is wrong with it is among the problems."""
        ...


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """The rows of a source, measured."""

    num_tokens: Tensor
    """int32 by row; 0 for one that cannot train."""
    num_supervised: Tensor
    num_tiles: Tensor
    counts: dict[str, int]
    """Rows by kind of problem."""
    num_fatal: int
    """Rows that cannot train."""

    def __len__(self) -> int:
        return self.num_tokens.numel()


def index_key(values: Any) -> str:
    """Digest what an index depends on, as JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def build_index(source: Measurable, folder: Path, *, key: str, workers: int = 1, volatile: Collection[str] = frozenset()) -> SampleIndex:
    """Return the index of a source from folder, where it is made first if it is not there or its key is another.

    Rows whose faults are of volatile kinds are measured again each time: what they are about may have been mended.
    """
    if not _is_current(folder, key):
        for old in folder.parent.glob(f".{folder.name}-*"):
            if old.name != f".{folder.name}-{key[:16]}":
                shutil.rmtree(old)
        parts = folder.with_name(f".{folder.name}-{key[:16]}")
        parts.mkdir(parents=True, exist_ok=True)
        _measure_all(source, parts, workers)
        _write(folder, key, *_joined(parts, len(source)))
        shutil.rmtree(parts)
    elif volatile:
        _measure_again(source, folder, key, volatile)
    return load_index(folder)


def load_index(folder: Path) -> SampleIndex:
    """Read an index that is there."""
    values = read_json(folder / _KEY_FILE)
    with TensorFolder(folder) as tensors:
        columns = {name: tensors.read(name) for name in _COLUMNS}
    return SampleIndex(**columns, counts=values["counts"], num_fatal=values["num_fatal"])


def _is_current(folder: Path, key: str) -> bool:
    if not folder.is_dir() or manifest_problems(folder, check_hashes=True):
        return False
    return bool(read_json(folder / _KEY_FILE).get("key") == key)


def _measure_all(source: Measurable, parts: Path, workers: int) -> None:
    """Measure every chunk that is not there yet. Raises: TrainingError when a process was killed."""
    chunks = [number for number in range(-(-len(source) // _CHUNK_ROWS)) if not _is_whole(parts / f"{number}.json")]
    if workers <= 1 or len(chunks) <= 1:
        _measure_chunks(source, parts, chunks, log_every_s=_LOG_EVERY_S)
        return
    context = multiprocessing.get_context("fork")
    shares = [chunks[first::workers] for first in range(min(workers, len(chunks)))]
    processes = [context.Process(target=_measure_there, args=(source, parts, share, place == 0)) for place, share in enumerate(shares)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()  # after an interruption; a chunk appears whole or not at all
            process.join()
    if any(process.exitcode != 0 for process in processes):
        raise TrainingError("a process that measured rows failed or was killed (out of memory?); run the same command again to go on")


def _is_whole(chunk: Path) -> bool:
    """Tell whether a chunk is there; a power cut may leave an empty file."""
    try:
        json.loads(chunk.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _measure_there(source: Measurable, parts: Path, chunks: Sequence[int], tells: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    torch.set_num_threads(1)
    _measure_chunks(source, parts, chunks, log_every_s=_LOG_EVERY_S if tells else math.inf)


def _measure_chunks(source: Measurable, parts: Path, chunks: Sequence[int], *, log_every_s: float) -> None:
    began = shown = time.monotonic()
    for done, number in enumerate(chunks, 1):
        _measure_chunk(source, parts, number)
        if (now := time.monotonic()) - shown >= log_every_s:
            shown = now
            left_s = (len(chunks) - done) * (now - began) / done
            _LOG.info("measuring rows: %.0f %%, %.0f s left", 100 * done / len(chunks), left_s)


def _measure_chunk(source: Measurable, parts: Path, number: int) -> None:
    first = number * _CHUNK_ROWS
    rows, ids, problems = [], [], []
    for index in range(first, min(first + _CHUNK_ROWS, len(source))):
        measured = source.measure(index)
        rows.append(_numbers(measured))
        ids.append(measured.id)
        problems += [[index, problem.kind, problem.message, problem.is_fatal] for problem in measured.problems]
    unfinished = parts / f"{number}.part"
    unfinished.write_text(json.dumps({"rows": rows, "ids": ids, "problems": problems}), encoding="utf-8")
    unfinished.replace(parts / f"{number}.json")


_Lines = list[tuple[int, Fault]]


def _joined(parts: Path, num_rows: int) -> tuple[list[list[int]], _Lines]:
    """Read the chunks: a row of numbers for each row, and all faults."""
    rows: list[list[int]] = []
    ids: list[str | int | None] = []
    problems: _Lines = []
    for number in range(-(-num_rows // _CHUNK_ROWS)):
        chunk = json.loads((parts / f"{number}.json").read_text("utf-8"))
        rows += chunk["rows"]
        ids += chunk["ids"]
        problems += [(index, Fault(*fault)) for index, *fault in chunk["problems"]]
    return rows, sorted([*problems, *duplicate_ids(ids).items()], key=lambda found: found[0])


def _measure_again(source: Measurable, folder: Path, key: str, volatile: Collection[str]) -> None:
    """Measure the rows whose faults may be gone, and write the index anew where some are."""
    told = [json.loads(line) for line in (folder / _PROBLEMS_FILE).read_text("utf-8").splitlines()]
    problems: _Lines = [(line["row"], Fault(line["kind"], line["message"], line["is_fatal"])) for line in told]
    doubtful = {row for row, fault in problems if fault.kind in volatile}
    if not doubtful:
        return
    index = load_index(folder)
    rows = torch.stack([index.num_tokens, index.num_supervised, index.num_tiles], dim=1).tolist()
    kept = [(row, fault) for row, fault in problems if row not in doubtful or fault.kind == "duplicate id"]
    for row in sorted(doubtful):
        measured = source.measure(row)
        rows[row] = _numbers(measured)
        kept += [(row, fault) for fault in measured.problems]
    kept.sort(key=lambda found: found[0])
    if sorted(map(repr, kept)) != sorted(map(repr, problems)):
        _LOG.info("%d rows were measured again: their pictures may have been mended", len(doubtful))
        _write(folder, key, rows, kept)


def _numbers(measured: Measures) -> list[int]:
    return [measured.num_tokens if measured.is_usable else 0, measured.num_supervised, measured.num_tiles]


def _write(folder: Path, key: str, rows: list[list[int]], problems: _Lines) -> None:
    """Write an index."""
    counts = Counter(kind for _, kind in {(index, fault.kind) for index, fault in problems})
    fatal = {index for index, fault in problems if fault.is_fatal}
    table = torch.tensor(rows, dtype=torch.int32).view(-1, len(_COLUMNS))
    columns = {name: table[:, place].contiguous() for place, name in enumerate(_COLUMNS)}
    with atomic_folder(folder, overwrite=True) as new:
        with (new / _PROBLEMS_FILE).open("w", encoding="utf-8") as file:
            for index, fault in problems:
                line = {"row": index, "kind": fault.kind, "message": fault.message, "is_fatal": fault.is_fatal}
                file.write(json.dumps(line) + "\n")
        write_tensors(new, {name: (torch.int32, (len(rows),)) for name in columns}, iter(columns.items()), max_shard_bytes=_NO_SPLIT)
        write_json(new / _KEY_FILE, {"key": key, "counts": dict(sorted(counts.items())), "num_fatal": len(fatal)})
