"""Batches prepared ahead by processes, in order.

Owns: BatchLoader. Invariants: batches come in the order of their numbers whatever the number of workers; few lie ready;
nothing of the parent's random generators is used; Ctrl-C and SIGTERM reach the parent alone, which finishes its step; a worker
whose parent is gone ends with the batch that it builds; a worker that dies is an error at once.
Each worker builds every so-manieth batch and hands it over through its own pipe, so that no lock is shared that a killed process
could hold (DataLoader's workers die from a signal to the process group, and its iterator draws from torch's generator).
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from llavakit.errors import LlavaError, TrainingError
from llavakit.training.data import BatchSource, Drawn

__all__ = ["BatchLoader"]

_READY_BATCHES = 4


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A dataclass on its way through a pipe, tensors as bytes: torch's own way needs the sender alive until they are opened."""

    kind: type[Any]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Bytes:
    """One tensor of a parcel."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: np.ndarray


class BatchLoader:
    """Yield the batches of a source that have these numbers; a context manager, since it owns processes.

    With workers = 0 the batches are built where they are asked for. Raises, from next(): what the source raises for bad data;
    TrainingError when a worker was killed; RuntimeError when it failed (a bug: its traceback is on stderr).
    """

    def __init__(self, source: BatchSource, numbers: Sequence[int], *, workers: int) -> None:
        self._source, self._numbers, self._place = source, numbers, 0
        self._num_workers = min(workers, len(numbers))
        self._workers: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._slots = threading.Semaphore(_READY_BATCHES)
        self._is_closing = threading.Event()
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        for worker in range(self._num_workers):
            self._start_worker(self._numbers[worker :: self._num_workers])
        if self._workers:
            self._reader = threading.Thread(target=self._read, name="batch-reader", daemon=True)
            self._reader.start()
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Drawn:
        if self._place == len(self._numbers):
            raise StopIteration
        place, self._place = self._place, self._place + 1
        if not self._workers:
            return self._source.batch(self._numbers[place])
        drawn: Drawn | LlavaError | EOFError = self._ready.get()
        self._slots.release()
        match drawn:
            case LlavaError():
                raise drawn
            case EOFError():
                raise self._death(place)
        return drawn

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closing.set()
        self._slots.release()
        for worker in self._workers:
            worker.kill()  # they hold nothing that could be torn
        for worker in self._workers:
            worker.join()
        if self._reader is not None:
            self._reader.join()
        for pipe in self._pipes:
            pipe.close()

    def _start_worker(self, numbers: Sequence[int]) -> None:
        context = _context()
        ours, theirs = context.Pipe(duplex=False)
        # A forked worker inherits our ends of the pipes; it closes them, or it would keep the pipes of a dead parent alive.
        inherited = [*self._pipes, ours] if isinstance(context, ForkContext) else []
        process = context.Process(target=_work, args=(self._source, numbers, theirs, inherited), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(process)
        self._pipes.append(ours)

    def _read(self) -> None:
        """Move batches from the pipes to the queue, in order (runs in a thread)."""
        for position in range(len(self._numbers)):
            self._slots.acquire()
            if self._is_closing.is_set():
                return
            try:
                received = self._pipes[position % self._num_workers].recv()
            except (EOFError, ConnectionError):
                self._ready.put(EOFError())
                return
            self._ready.put(_unpack(received))

    def _death(self, place: int) -> Exception:
        worker, number = self._workers[place % self._num_workers], self._numbers[place]
        worker.join()
        code = worker.exitcode
        if code is not None and code < 0:
            return TrainingError(f"the data worker of batch {number} was killed ({signal.Signals(-code).name}); out of memory?")
        return RuntimeError(f"a data worker failed at batch {number}; its traceback is above")


def _work(source: BatchSource, numbers: Sequence[int], pipe: Connection, inherited: Sequence[Connection]) -> None:
    """Build batches until they are done or nobody takes them (the body of a worker process)."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    for connection in inherited:
        connection.close()
    torch.set_num_threads(1)  # also what makes torch usable after a fork
    for number in numbers:
        try:
            built = _pack(source.batch(number))
        except LlavaError as error:
            built = error
        try:
            pipe.send(built)
        except BrokenPipeError:
            return  # the parent is gone


def _pack(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _to_bytes(value)
    if not dataclasses.is_dataclass(value):
        return value
    return _Parcel(type(value), {field.name: _pack(getattr(value, field.name)) for field in dataclasses.fields(value)})


def _unpack(value: Any) -> Any:
    if isinstance(value, _Bytes):
        return _to_tensor(value)
    return value.kind(**{name: _unpack(part) for name, part in value.values.items()}) if isinstance(value, _Parcel) else value


def _to_bytes(tensor: Tensor) -> _Bytes:
    return _Bytes(tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _to_tensor(sent: _Bytes) -> Tensor:
    return torch.from_numpy(sent.data).view(sent.dtype).reshape(sent.shape)


def _context() -> ForkContext | SpawnContext:
    """Fork where it is safe: it needs no import of torch and no source that can be pickled."""
    return multiprocessing.get_context("fork") if sys.platform == "linux" else multiprocessing.get_context("spawn")
