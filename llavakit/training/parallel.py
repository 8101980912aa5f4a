"""One process, or many that train one model: FSDP2 over the ranks that torchrun started.

Owns: Alone and Ranks, which answer the same questions: which batches are mine, what do all of us sum up to, who writes.
Invariants: every rank makes the same calls in the same order; gradients are summed, not averaged, so that the division by the weight of
the whole step is the only one; a frozen tower is not sharded, so that ranks may see different numbers of pictures, none too.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from llavakit.errors import ConfigError
from llavakit.model.decoder import DecoderLayer
from llavakit.model.llava import LlavaCore

__all__ = ["Alone", "Parallel", "Ranks", "end_rank", "join_ranks", "whole"]

T = TypeVar("T")
_PATIENCE = timedelta(hours=1)
"""How long the others wait for the first process, which measures rows and writes saves."""


class Parallel(Protocol):
    """What a trainer asks of the processes around it."""

    rank: int
    """Number of this process; 0 writes."""
    size: int
    """Processes in all."""

    def shard(self, model: nn.Module, dtype: torch.dtype, entries: Sequence[str]) -> None:
        """Distribute the model, whose methods named entries are what training calls; activations are in dtype."""
        ...

    def summed(self, values: Sequence[float]) -> list[float]:
        """Add up the ranks' values."""
        ...

    def shared(self, value: T) -> T:
        """Return rank 0's value."""
        ...

    def wait(self) -> None:
        """Wait for all ranks."""
        ...


class Alone:
    """The only process."""

    rank, size = 0, 1

    def shard(self, model: nn.Module, dtype: torch.dtype, entries: Sequence[str]) -> None:
        """Leave the model whole."""

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def shared(self, value: T) -> T:
        """Return the value."""
        return value

    def wait(self) -> None:
        """Wait for nobody."""


class Ranks:
    """The processes of torch.distributed's default group, which must have begun."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.mesh = _mesh(device.type, self.size, None)

    def replicate(self, shard_ranks: int | None) -> None:
        """Shard over shard_ranks neighbours and replicate over the rest; None shards over all. Raises: ConfigError."""
        if shard_ranks is not None and (shard_ranks < 1 or self.size % shard_ranks):
            raise ConfigError(f"shard_ranks must divide the {self.size} processes, got {shard_ranks}")
        self.mesh = _mesh(self.device.type, self.size, shard_ranks)

    def shard(self, model: nn.Module, dtype: torch.dtype, entries: Sequence[str]) -> None:
        """Shard layer by layer, the rest with the root; a frozen tower stays whole everywhere."""
        policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
        for layer in [module for module in model.modules() if isinstance(module, DecoderLayer)]:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        kept: set[nn.Parameter] = set()
        if isinstance(model, LlavaCore):
            tower = list(model.vision_tower.parameters())
            if any(weight.requires_grad for weight in tower):
                fully_shard(model.vision_tower, mesh=self.mesh, mp_policy=policy)
                register_fsdp_forward_method(model.vision_tower, "features")
            else:
                kept = set(tower)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=kept)
        for entry in entries:
            register_fsdp_forward_method(model, entry)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def summed(self, values: Sequence[float]) -> list[float]:
        """Add up the ranks' values; waits for all of them."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def shared(self, value: T) -> T:
        """Send rank 0's value to all."""
        sent = [value]
        dist.broadcast_object_list(sent, src=0, device=self.device)
        return sent[0]

    def wait(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def leave(self) -> None:
        """Wait for all ranks and part from them; a process that just ends may be taken for a dead one."""
        self.wait()
        dist.destroy_process_group()


def end_rank() -> NoReturn:
    """End this process well, after leave(), without taking the interpreter down.

    gloo's threads outlive its group, and one that meets the interpreter's end can abort the process: torchrun would call a run that is
    whole and exported a failure, and start it again.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def join_ranks(environment: Mapping[str, str]) -> Ranks:
    """Join the processes that torchrun started, of whose variables this is one's environment; each has a GPU, or all are on the CPU."""
    rank, size, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    is_hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), size, is_master=rank == 0 and not is_hosted)
    # After a restart the store still holds the addresses of the dead.
    fresh = PrefixStore(f"attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=fresh, rank=rank, world_size=size, timeout=_PATIENCE)
    return Ranks(device)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be distributed; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mesh(device: str, size: int, shard_ranks: int | None) -> DeviceMesh:
    if shard_ranks is None or shard_ranks == size:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (size // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))
