"""Everything a run needs to go on after a kill, in safetensors and JSON; of several processes, in torch's distributed format and JSON.

Owns: RunState and its saves: writing them whole, finding the newest good one, removing old ones; the lock of a run folder.
State: trainable parameters, optimiser states, the step (which is also schedule, data position and seed of what is drawn), counters.
A save also holds the run's identity (settings, names and shapes) and a digest of the last batch. Any number of processes reads what any
other number wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from llavakit.errors import TrainingError, shortened
from llavakit.logs import logger
from llavakit.storage.documents import read_json, write_json
from llavakit.storage.folder import atomic_folder, manifest_problems, remove_unfinished
from llavakit.storage.tensors import TensorFolder, write_tensors
from llavakit.training.parallel import Alone, Parallel

__all__ = ["RunState", "Saves", "run_lock"]

_LOG = logger("training")
_STATE_FILE, _LOCK_FILE, _DISTRIBUTED = "state.json", "lock", "shards"
_VERSION = 3
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
        return named

    def values(self) -> dict[str, Any]:
        """Return what is not a tensor, as JSON."""
        return {
            "step": self.step,
            "num_skipped": self.num_skipped,
            "num_skipped_in_row": self.num_skipped_in_row,
            "num_samples": self.num_samples,
            "num_left_out": self.num_left_out,
            "batch_digest": self.batch_digest,
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take the values of a save of the same run."""
        self.step, self.batch_digest = values["step"], values["batch_digest"]
        self.num_skipped, self.num_skipped_in_row = values["num_skipped"], values["num_skipped_in_row"]
        self.num_samples, self.num_left_out = values["num_samples"], values["num_left_out"]

    def restore_tensor(self, key: str, value: Tensor) -> None:
        """Take one whole tensor of a save; every process must, in the same order."""
        target = self.place(key, value.dtype, value.shape)
        with torch.no_grad():
            if isinstance(target, DTensor):
                value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
            target.copy_(value)

    def place(self, key: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Return where a tensor of a save belongs; an optimiser's is made where it is not there yet, distributed as its parameter is."""
        kind, _, name = key.partition("/")
        if kind == "parameter":
            return self.parameters[name].detach()
        entry, _, name = name.partition("/")
        weight, state = self.parameters[name], self._optimizer_state(name)
        if entry not in state:
            state[entry] = torch.zeros_like(weight, dtype=dtype).detach() if shape == weight.shape else torch.zeros(shape, dtype=dtype)
        return state[entry]  # type: ignore[no-any-return]

    def _optimizer_state(self, name: str) -> dict[str, Any]:
        weight = self.parameters[name]
        for optimizer in self.optimizers:
            if any(weight is one for group in optimizer.param_groups for one in group["params"]):
                state: dict[str, Any] = optimizer.state[weight]
                return state
        raise TrainingError(f"a save holds the optimiser's state of {name}, which no optimiser trains")


class Saves:
    """The saves of one run: folders step-N inside its run folder."""

    def __init__(self, run_dir: Path, *, identity: Mapping[str, Any], keep_last: int, parallel: Parallel = Alone()) -> None:
        """Take what must be the same for a save to be continued, as JSON values."""
        self._run_dir, self._keep_last, self._parallel = run_dir, keep_last, parallel
        self._identity = json.loads(json.dumps(identity))

    def write(self, state: RunState) -> None:
        """Save the state whole, then remove all but the newest saves. Raises: StorageError; earlier saves stay as they are."""
        destination = self._run_dir / f"step-{state.step:08d}"
        if self._parallel.size == 1:
            tensors = state.tensors()
            specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            with atomic_folder(destination, overwrite=True) as folder:
                write_tensors(folder, specs, iter(tensors.items()), max_shard_bytes=_NO_SPLIT)
                self._write_values(folder, state)
        else:
            with atomic_folder(destination, overwrite=True) if self._parallel.rank == 0 else contextlib.nullcontext(destination) as own:
                folder = Path(self._parallel.shared(str(own)))
                save(dict(state.tensors()), checkpoint_id=folder / _DISTRIBUTED)
                self._parallel.wait()
                if self._parallel.rank == 0:
                    self._write_values(folder, state)
            self._parallel.wait()
        if self._parallel.rank == 0:
            for old in self._newest_first()[self._keep_last :]:
                shutil.rmtree(old, ignore_errors=True)  # what could not be removed is tried again at the next save

    def _write_values(self, folder: Path, state: RunState) -> None:
        write_json(folder / _STATE_FILE, {"version": _VERSION, **state.values(), "identity": self._identity})

    def restore_newest(self, state: RunState) -> bool:
        """Restore the newest undamaged save and remove damaged ones after it, saying so; False when there are no saves.

        Raises: TrainingError when the save belongs to a run with other settings, or all saves are damaged.
        """
        newest = self._parallel.shared(self._find_newest() if self._parallel.rank == 0 else None)
        if newest is None:
            return False
        folder = Path(newest)
        values = read_json(folder / _STATE_FILE)
        self._check(values)
        state.restore(values)
        if (folder / _DISTRIBUTED).is_dir():
            reader = FileSystemReader(folder / _DISTRIBUTED)
            entries = reader.read_metadata().state_dict_metadata.items()
            places = {
                key: state.place(key, entry.properties.dtype, entry.size)
                for key, entry in entries
                if isinstance(entry, TensorStorageMetadata)
            }
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads what several wrote: as meant
                load(places, storage_reader=reader)
        else:
            with TensorFolder(folder) as tensors:
                for name in tensors.in_file_order():
                    state.restore_tensor(name, tensors.read(name))
        return True

    def _find_newest(self) -> str | None:
        """Return the newest undamaged save, having removed damaged ones after it; None where there are no saves."""
        remove_unfinished(self._run_dir)  # the run lock keeps all others out
        saves = self._newest_first()
        for position, folder in enumerate(saves):
            problems = manifest_problems(folder, check_hashes=True)
            if problems:
                _LOG.warning("save %s is damaged (%s); trying the one before", folder.name, problems[0])
                continue
            for damaged in saves[:position]:
                shutil.rmtree(damaged)
            return str(folder)
        if saves:
            raise TrainingError(f"all {len(saves)} saves in {self._run_dir} are damaged; remove the folder to start over")
        return None

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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
