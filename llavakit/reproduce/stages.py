"""Stages of a reproduction: named steps whose results are complete folders.

Owns: which stages are done, which must run, and in what order. A stage is done when its folder has a verified manifest
made from the same inputs (its settings and the manifests of the stages it reads); kill -9 at any moment loses at most the
running stage, and a training stage resumes inside from its own saves. stages.jsonl keeps how long each finished try took.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.logs import logger
from llavakit.storage.folder import atomic_folder, read_manifest

__all__ = ["Stage", "StageContext", "run_stages"]

_LOG = logger("reproduce")
_KEY_FILE = "stage.json"
_TIMES_FILE = "stages.jsonl"


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
            start = time.monotonic()
            scratch = folder / f"{stage.name}.work" / keys[stage.name][:12]
            scratch.mkdir(parents=True, exist_ok=True)
            with atomic_folder(path, overwrite=True) as out:
                stage.run(StageContext(out, scratch, {name: done[name] for name in stage.inputs}))
                (out / _KEY_FILE).write_text(json.dumps({"key": keys[stage.name]}) + "\n", encoding="utf-8")
            shutil.rmtree(scratch.parent, ignore_errors=True)
            _note(folder, {"stage": stage.name, "seconds": round(time.monotonic() - start, 1)})
        done[stage.name] = path
    return done


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
