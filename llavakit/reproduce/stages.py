"""Stages of a reproduction: named steps whose results are complete folders.

Owns: which stages are done, which must run, and in what order. A stage is done when its folder has a verified manifest
made from the same inputs (its settings and the manifests of the stages it reads); kill -9 at any moment loses at most the
running stage, and a training stage resumes inside from its own saves. stages.jsonl keeps how long each stage took, all tries together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llavakit.logs import logger
from llavakit.storage.folder import atomic_folder, read_manifest

__all__ = ["Stage", "StageContext", "run_stages"]

_LOG = logger("reproduce")
_KEY_FILE = "stage.json"
_TIMES_FILE = "stages.jsonl"
_BEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a running stage may touch: its output folder, its scratch folder (kept until it is done), its inputs' folders."""

    out: Path
    scratch: Path
    inputs: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: run(context) fills context.out from context.inputs; settings are plain JSON that its result depends on."""

    name: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    run: Callable[[StageContext], None]


def run_stages(stages: Sequence[Stage], folder: Path) -> dict[str, Path]:
    """Run what is not done yet, in order, and return each stage's folder."""
    done: dict[str, Path] = {}
    keys: dict[str, str] = {}
    for stage in stages:
        path = folder / stage.name
        keys[stage.name] = _key(stage, keys)
        if _is_done(path, keys[stage.name]):
            _LOG.info("%s: done before", stage.name)
        else:
            _LOG.info("%s: running", stage.name)
            scratch = folder / f"{stage.name}.work" / keys[stage.name][:12]
            scratch.mkdir(parents=True, exist_ok=True)
            with _Clock(scratch / "seconds") as clock, atomic_folder(path, overwrite=True) as out:
                stage.run(StageContext(out, scratch, {name: done[name] for name in stage.inputs}))
                (out / _KEY_FILE).write_text(json.dumps({"key": keys[stage.name]}) + "\n", encoding="utf-8")
            shutil.rmtree(scratch.parent, ignore_errors=True)
            _note(folder, {"stage": stage.name, "seconds": round(clock.seconds, 1), "tries": clock.tries})
        done[stage.name] = path
    return done


class _Clock:
    """Counts a stage's seconds over all its tries: every few seconds they are written down, so that kill -9 hides next to none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.monotonic()
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0, "tries": 0}
        self._before, self.tries = float(before["seconds"]), int(before["tries"]) + 1
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + time.monotonic() - self._start

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()
        self._write()

    def _keep(self) -> None:
        while not self._is_over.wait(_BEAT_S):
            self._write()

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"seconds": self.seconds, "tries": self.tries}), encoding="utf-8")
        part.replace(self._path)


def _key(stage: Stage, keys: Mapping[str, str]) -> str:
    parts = {"name": stage.name, "settings": stage.settings, "inputs": {name: keys[name] for name in stage.inputs}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _note(folder: Path, values: Mapping[str, Any]) -> None:
    with (folder / _TIMES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def _is_done(path: Path, key: str) -> bool:
    if read_manifest(path) is None:
        return False
    key_file = path / _KEY_FILE
    return key_file.is_file() and json.loads(key_file.read_text(encoding="utf-8"))["key"] == key
