"""The objective: one call of loss_packed, in the dtype of the run, with counts for the reporter."""

from typing import Any

import torch

from llavakit.model.llava import LossTerms
from llavakit.training.objectives import NUM_SAMPLES, NUM_TOKENS, PackedLoss
from tests.toy_run import toy_core, toy_source


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def loss_packed(self, batch: Any, *, dtype: torch.dtype | None = None) -> LossTerms:
        self.calls.append((batch, dtype))
        return LossTerms(torch.tensor(2.0), torch.tensor(1), {"num_right": torch.tensor(1)})


def test_other_batches_pass_through_unchanged() -> None:
    model = Recorder()
    terms = PackedLoss("bfloat16").loss(model, "a batch of another kind")
    assert model.calls == [("a batch of another kind", torch.bfloat16)]
    assert set(terms.metrics) == {"num_right"}


def test_tokens_and_sequences_are_counted() -> None:
    batch = toy_source(samples_per_batch=3).batch(0)
    metrics = PackedLoss("float32").loss(toy_core(), batch).metrics
    assert int(metrics[NUM_TOKENS]) == batch.ids_T.numel()
    assert int(metrics[NUM_SAMPLES]) == 3
