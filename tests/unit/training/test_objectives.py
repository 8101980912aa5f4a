"""The objective: one call of loss_packed, in the dtype of the run."""

from typing import Any

import torch

from llavakit.model.llava import LossTerms
from llavakit.training.objectives import PackedLoss


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def loss_packed(self, batch: Any, *, dtype: torch.dtype | None = None) -> LossTerms:
        self.calls.append((batch, dtype))
        return LossTerms(torch.tensor(2.0), torch.tensor(1), {"num_right": torch.tensor(1)})


def test_the_model_is_called_once_in_the_dtype_of_the_run() -> None:
    model = Recorder()
    terms = PackedLoss("bfloat16").loss(model, "a batch of any kind")
    assert model.calls == [("a batch of any kind", torch.bfloat16)]
    assert set(terms.metrics) == {"num_right"}
