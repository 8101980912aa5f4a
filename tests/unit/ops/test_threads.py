"""ops.threads: one thread for a while, and the end of a team."""

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

from llavakit.ops.cpu.library import load_kernels
from llavakit.ops.threads import end_team, one_thread


def test_the_number_of_threads_comes_back() -> None:
    before, inside = torch.get_num_threads(), []
    with one_thread():
        inside.append(torch.get_num_threads())
    assert inside == [1]
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not os.path.exists("/proc/self/task") or load_kernels() is None, reason="needs Linux and a C compiler")
def test_a_team_ends_and_comes_again() -> None:
    counts: list[int] = []

    def waited(is_right: Callable[[int], bool]) -> int:
        deadline = time.monotonic() + 10
        while not is_right(count := len(os.listdir("/proc/self/task"))) and time.monotonic() < deadline:
            time.sleep(0.01)
        return count

    def compute() -> None:
        torch.set_num_threads(3)
        for _ in range(2):
            torch.ones(1 << 22).exp_()
            counts.append(len(os.listdir("/proc/self/task")))
            end_team()
            counts.append(waited(lambda count: count == counts[-1] - 2))

    before = torch.get_num_threads()
    try:
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    first, ended, again, ended_again = counts
    assert first - ended == again - ended_again == 2, counts
