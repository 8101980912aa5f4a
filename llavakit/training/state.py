"""Everything a run needs to go on after a kill, in safetensors and JSON.

Owns: RunState and its saves: writing them whole, finding the newest good one, removing old ones; the lock of a run folder.
State: trainable parameters, optimiser states, the step (which is also schedule and data position), counters, the generators
of torch, numpy and Python. A save also holds the run's identity (settings, names and shapes) and a digest of the last batch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from llavakit.errors import TrainingError, shortened
from llavakit.logs import logger
from llavakit.storage.documents import read_json, write_json
from llavakit.storage.folder import atomic_folder, manifest_problems, remove_unfinished
from llavakit.storage.tensors import TensorFolder, write_tensors

__all__ = ["RunState", "Saves", "run_lock"]

_LOG = logger("training")
_STATE_FILE, _LOCK_FILE = "state.json", "lock"
_VERSION = 2
_NO_SPLIT = 1 << 62
_MAX_LISTED = 5


class RunState:
    """The mutable things of a run, and how they turn into named tensors and plain values."""

    def __init__(self, parameters: Mapping[str, Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.parameters, self.optimizers = dict(parameters), list(optimizers)
        self.step = 0
        """Steps done."""
        self.num_skipped, self.num_skipped_in_row = 0, 0
        """Updates left out because loss or gradient was not finite."""
        self.num_samples, self.num_left_out = 0, 0
        """Samples that came up, and those of them that could not be built."""
        self.batch_digest = ""
        """Digest of the last batch that was trained on."""

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor of the state."""
        named = {f"parameter/{name}": weight.detach() for name, weight in self.parameters.items()}
        for name, weight in self.parameters.items():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(weight, {}).items():
                    named[f"optimizer/{key}/{name}"] = value
        named["generator/torch"] = torch.get_rng_state()
        named["generator/numpy"] = torch.from_numpy(_numpy_generator()["state"]["key"].astype(np.int64))
        named["generator/python"] = torch.tensor(random.getstate()[1])
        return named

    def values(self) -> dict[str, Any]:
        """Return what is not a tensor, as JSON."""
        numpy_state = _numpy_generator()
        version, _, gauss = random.getstate()
        return {
            "step": self.step,
            "num_skipped": self.num_skipped,
            "num_skipped_in_row": self.num_skipped_in_row,
            "num_samples": self.num_samples,
            "num_left_out": self.num_left_out,
            "batch_digest": self.batch_digest,
            "numpy": {"pos": numpy_state["state"]["pos"], "has_gauss": numpy_state["has_gauss"], "gauss": numpy_state["gauss"]},
            "python": {"version": version, "gauss": gauss},
        }

    def restore(self, named: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take the tensors and values of a save of the same run."""
        self.step, self.batch_digest = values["step"], values["batch_digest"]
        self.num_skipped, self.num_skipped_in_row = values["num_skipped"], values["num_skipped_in_row"]
        self.num_samples, self.num_left_out = values["num_samples"], values["num_left_out"]
        self._restore_tensors(named)
        torch.set_rng_state(named["generator/torch"])
        own = values["numpy"]
        words = named["generator/numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, own["pos"], own["has_gauss"], own["gauss"]))
        random.setstate((values["python"]["version"], tuple(named["generator/python"].tolist()), values["python"]["gauss"]))

    def _restore_tensors(self, named: Mapping[str, Tensor]) -> None:
        owners = {weight: optimizer for optimizer in self.optimizers for group in optimizer.param_groups for weight in group["params"]}
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(named[f"parameter/{name}"])
        for key, value in named.items():
            if key.startswith("optimizer/"):
                _, entry, name = key.split("/", 2)
                weight = self.parameters[name]
                owners[weight].state[weight][entry] = value.to(weight.device)


class Saves:
    """The saves of one run: folders step-N inside its run folder."""

    def __init__(self, run_dir: Path, *, identity: Mapping[str, Any], keep_last: int) -> None:
        """Take what must be the same for a save to be continued, as JSON values."""
        self._run_dir, self._keep_last = run_dir, keep_last
        self._identity = json.loads(json.dumps(identity))

    def write(self, state: RunState) -> None:
        """Save the state whole, then remove all but the newest saves. Raises: StorageError; earlier saves stay as they are."""
        tensors = state.tensors()
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with atomic_folder(self._run_dir / f"step-{state.step:08d}", overwrite=True) as folder:
            write_tensors(folder, specs, iter(tensors.items()), max_shard_bytes=_NO_SPLIT)
            write_json(folder / _STATE_FILE, {"version": _VERSION, **state.values(), "identity": self._identity})
        for old in self._newest_first()[self._keep_last :]:
            shutil.rmtree(old, ignore_errors=True)  # what could not be removed is tried again at the next save

    def restore_newest(self, state: RunState) -> bool:
        """Restore the newest undamaged save and remove damaged ones after it, saying so; False when there are no saves.

        Raises: TrainingError when the save belongs to a run with other settings, or all saves are damaged.
        """
        remove_unfinished(self._run_dir)  # the run lock keeps all others out
        saves = self._newest_first()
        for position, folder in enumerate(saves):
            problems = manifest_problems(folder, check_hashes=True)
            if problems:
                _LOG.warning("save %s is damaged (%s); trying the one before", folder.name, problems[0])
                continue
            values = read_json(folder / _STATE_FILE)
            self._check(values)
            with TensorFolder(folder) as tensors:
                state.restore({name: tensors.read(name) for name in tensors.in_file_order()}, values)
            for damaged in saves[:position]:
                shutil.rmtree(damaged)
            return True
        if saves:
            raise TrainingError(f"all {len(saves)} saves in {self._run_dir} are damaged; remove the folder to start over")
        return False

    def _check(self, values: Mapping[str, Any]) -> None:
        if values.get("version") != _VERSION:
            raise TrainingError(
                f"{self._run_dir} was written by another version of llavakit; use another folder, or remove it to start over"
            )
        before, now = _flat(values["identity"]), _flat(self._identity)
        changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if changed:
            changes = [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed]
            listed = "; ".join(shortened(changes, _MAX_LISTED))
            raise TrainingError(
                f"{self._run_dir} holds a run with other settings: {listed}; use another folder, or remove it to start over"
            )

    def _newest_first(self) -> list[Path]:
        return sorted(self._run_dir.glob("step-*"), reverse=True)


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system lets go of it when the process ends, however it ends.

    Raises: TrainingError when another process trains there.
    """
    with (run_dir / _LOCK_FILE).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # belongs to the process: workers do not inherit it
        except OSError as error:
            raise TrainingError(f"another process trains in {run_dir}; wait for it, or use another folder") from error
        yield


def _numpy_generator() -> dict[str, Any]:
    return dict(np.random.get_state(legacy=False))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
