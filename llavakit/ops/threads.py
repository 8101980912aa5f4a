"""How many threads compute.

Owns: one_thread and end_team. OpenMP makes a team for each thread that computes, and keeps it. Where all teams together have more threads
than the machine has cores, libgomp's waiting threads sleep at once, and waking them costs more than most of our products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from llavakit.ops.cpu.library import load_kernels

__all__ = ["end_team", "one_thread"]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in the calling thread alone: for small work beside another busy thread, where a team would wait for its slowest."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def end_team() -> None:
    """End the team of the calling thread, before another thread computes in its place; it gets a new one where it computes again."""
    kernels = load_kernels()
    if kernels is not None:
        kernels.end_team()
