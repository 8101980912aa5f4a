"""ops.threads: one thread for a while, and the end of a team."""

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

from llavakit.ops.threads import _openmp, end_team, one_thread


def test_the_number_of_threads_comes_back() -> None:
    before, inside = torch.get_num_threads(), []
    with one_thread():
        inside.append(torch.get_num_threads())
    assert inside == [1]
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_other_threads_keep_their_number() -> None:
    before, found = torch.get_num_threads(), []
    inside, over = threading.Event(), threading.Event()

    def small() -> None:
        with one_thread():
            inside.set()
            over.wait(10)

    one = threading.Thread(target=small)
    one.start()
    assert inside.wait(10)
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    over.set()
    one.join()
    assert found == [before]


@pytest.mark.skipif(not os.path.exists("/proc/self/task") or _openmp() is None, reason="needs Linux and GNU's OpenMP")
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
