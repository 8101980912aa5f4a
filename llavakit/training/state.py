"""Everything a run needs to go on after a kill, in safetensors and JSON.

Owns: the run folder's saves: writing them whole, finding the newest good one, removing old ones.
State: trainable parameters, optimiser states, the step (which is also schedule and data position), torch's generator.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from llavakit.errors import TrainingError
from llavakit.logs import logger
from llavakit.storage.documents import read_json, write_json
from llavakit.storage.folder import atomic_folder, manifest_problems
from llavakit.storage.tensors import TensorFolder, write_tensors

__all__ = ["RunState", "load_state", "save_state"]

_LOG = logger("training")
_STATE_FILE = "state.json"
_NO_SPLIT = 1 << 62


class RunState:
    """The mutable things of a run, and how they turn into named tensors."""

    def __init__(self, parameters: Mapping[str, Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.parameters, self.optimizers = dict(parameters), list(optimizers)
        self.step = 0

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor of the state."""
        named = {f"parameter/{name}": weight.detach() for name, weight in self.parameters.items()}
        for name, weight in self.parameters.items():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(weight, {}).items():
                    named[f"optimizer/{key}/{name}"] = value
        named["generator"] = torch.get_rng_state()
        return named

    def restore(self, step: int, named: Mapping[str, Tensor]) -> None:
        """Take the tensors of a save of the same run."""
        self.step = step
        torch.set_rng_state(named["generator"])
        owners = {weight: optimizer for optimizer in self.optimizers for group in optimizer.param_groups for weight in group["params"]}
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(named[f"parameter/{name}"])
                saved = {
                    key.split("/", 2)[1]: value
                    for key, value in named.items()
                    if key.startswith("optimizer/") and key.split("/", 2)[2] == name
                }
                if saved:
                    owners[weight].state[weight] = saved


def save_state(state: RunState, run_dir: Path, *, config_key: str, keep_last: int) -> None:
    """Save the state whole as run_dir/step-N and remove all but the keep_last newest saves."""
    tensors = state.tensors()
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic_folder(run_dir / f"step-{state.step:08d}", overwrite=True) as folder:
        write_tensors(folder, specs, iter(tensors.items()), max_shard_bytes=_NO_SPLIT)
        write_json(folder / _STATE_FILE, {"step": state.step, "config_key": config_key})
    for old in _saves(run_dir)[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(state: RunState, run_dir: Path, *, config_key: str) -> bool:
    """Restore the newest undamaged save, and say so when a newer one is damaged; False when there is none.

    Raises: TrainingError when the save belongs to a run with other settings.
    """
    for folder in _saves(run_dir):
        problems = manifest_problems(folder, check_hashes=True)
        if problems:
            _LOG.warning("save %s is damaged (%s); trying the one before", folder.name, problems[0])
            continue
        values = read_json(folder / _STATE_FILE)
        if values["config_key"] != config_key:
            raise TrainingError(f"{run_dir} holds a run with other settings; use another folder, or remove it to start over")
        state.restore(int(values["step"]), dict(_read_all(folder)))
        return True
    return False


def _read_all(folder: Path) -> Iterator[tuple[str, Tensor]]:
    tensors = TensorFolder(folder)
    for name in tensors.in_file_order():
        yield name, tensors.read(name)
    tensors.close()


def _saves(run_dir: Path) -> list[Path]:
    """The saves of a run, newest first."""
    return sorted(run_dir.glob("step-*"), reverse=True)
