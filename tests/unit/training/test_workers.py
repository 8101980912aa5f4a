"""Workers: order, errors, and what signals and deaths do to them."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llavakit.errors import DataError, LlavaError, TrainingError
from llavakit.training.data import Drawn
from llavakit.training.workers import BatchLoader


@dataclass(frozen=True)
class Batch:
    number: int
    pid: int
    num_threads: int
    pixels: Tensor


class Numbers:
    """Batch n holds n; one number can fail."""

    def __init__(self, *, failing: int = -1, error: Exception | None = None, log: Path | None = None) -> None:
        self.failing, self.error, self.log = failing, error, log

    def batch(self, number: int) -> Drawn:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{number}\n")
        if number == self.failing and self.error is not None:
            raise self.error
        batch = Batch(number, os.getpid(), torch.get_num_threads(), torch.full((2, 2), number, dtype=torch.bfloat16))
        return Drawn(batch, 1, 4, ("one",))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_does_not_depend_on_workers(workers: int) -> None:
    with BatchLoader(Numbers(), range(5, 17), workers=workers) as loader:
        batches = [drawn.batch for drawn in loader]
    assert [batch.number for batch in batches] == list(range(5, 17))
    assert all(torch.equal(batch.pixels, torch.full((2, 2), batch.number, dtype=torch.bfloat16)) for batch in batches)


def test_workers_use_one_thread_each_and_no_random_numbers_of_the_parent() -> None:
    before = torch.get_rng_state()
    with BatchLoader(Numbers(), range(4), workers=2) as loader:
        batches = [drawn.batch for drawn in loader]
    assert {batch.num_threads for batch in batches} == {1}
    assert len({batch.pid for batch in batches} - {os.getpid()}) == 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_surfaces_at_its_batch(workers: int) -> None:
    with BatchLoader(Numbers(failing=3, error=DataError("sample 9: torn")), range(9), workers=workers) as loader:
        assert [next(loader).batch.number for _ in range(3)] == [0, 1, 2]
        with pytest.raises(LlavaError, match="sample 9: torn"):
            next(loader)


def test_a_bug_surfaces_and_leaves_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with BatchLoader(Numbers(failing=1, error=KeyError("gone")), range(9), workers=2) as loader:
        next(loader)
        with pytest.raises(RuntimeError, match="failed at batch 1; its traceback is above"):
            next(loader)
    assert "KeyError: 'gone'" in capfd.readouterr().err


def test_a_killed_worker_is_an_error_at_once() -> None:
    with BatchLoader(Numbers(), range(100_000), workers=1) as loader:
        os.kill(next(loader).batch.pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match="was killed \\(SIGKILL\\)"):
            list(loader)


def test_signals_to_the_process_group_leave_workers_alone() -> None:
    with BatchLoader(Numbers(), range(100), workers=1) as loader:
        pid = next(loader).batch.pid
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        assert len(list(loader)) == 99


def test_only_a_few_batches_are_built_ahead(tmp_path: Path) -> None:
    log = tmp_path / "built"
    with BatchLoader(Numbers(log=log), range(100_000), workers=2) as loader:
        next(loader)
        time.sleep(0.2)
        num_built = len(log.read_text().splitlines())
    # Besides the few ready ones, small batches lie in the two pipes (64 KiB each).
    assert num_built < 1000


def test_no_worker_outlives_a_killed_parent() -> None:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with BatchLoader(Numbers(), range(10**9), workers=2) as loader:
            os.write(theirs, " ".join(str(next(loader).batch.pid) for _ in range(2)).encode())
            time.sleep(60)
        os._exit(1)
    workers = [int(pid) for pid in os.read(ours, 100).split()]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in workers if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(ours)
    os.close(theirs)
    assert len(workers) == 2
    assert not alive


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
