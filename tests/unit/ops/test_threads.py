"""ops.threads: one thread for a while."""

import pytest
import torch

from llavakit.ops.threads import one_thread


def test_the_number_of_threads_comes_back() -> None:
    before, inside = torch.get_num_threads(), []
    with one_thread():
        inside.append(torch.get_num_threads())
    assert inside == [1]
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_num_threads() == before
