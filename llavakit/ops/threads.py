"""How many threads compute.

Owns: one_thread and end_team. OpenMP makes a team for each thread that computes, and keeps it. Where all teams together have more threads
than the machine has cores, libgomp's waiting threads sleep at once, and waking them costs more than most of our products.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["end_team", "one_thread"]

_PAUSE_SOFT = 1  # omp_pause_soft
_PROCESS = os.getpid()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in the calling thread alone: for small work beside another busy thread, where a team would wait for its slowest."""
    number = torch.get_num_threads()  # this settles the thread's count, which torch reads from the process's own once
    openmp = _openmp()
    # Torch's own function sets the process's count too, which other threads then begin with.
    set_number = torch.set_num_threads if openmp is None else openmp.omp_set_num_threads
    set_number(1)
    try:
        yield
    finally:
        set_number(number)


def end_team() -> None:
    """End the team of the calling thread, before another thread computes in its place; it gets a new one where it computes again."""
    openmp = _openmp()
    if openmp is not None and os.getpid() == _PROCESS:  # the team of a forked process is gone already, and would be waited for
        openmp.omp_pause_resource_all(_PAUSE_SOFT)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return GNU's OpenMP as torch has it loaded; None where torch has another, or an old one."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        with contextlib.suppress(OSError, AttributeError):
            openmp = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            openmp.omp_pause_resource_all, openmp.omp_set_num_threads  # noqa: B018 - whether they are there
            return openmp
    return None
