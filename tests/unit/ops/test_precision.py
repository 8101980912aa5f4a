"""The faster dtype is found by timing products, whatever the processor says of itself."""

import pytest
import torch

from llavakit.ops import precision


class Clock:
    """A clock that only products move: each dtype's take so many seconds."""

    def __init__(self, seconds: dict[torch.dtype, float]) -> None:
        self.seconds, self.now = seconds, 0.0

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        self.now += self.seconds[x.dtype]

    def perf_counter(self) -> float:
        return self.now


def test_the_dtype_with_the_shorter_products_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for float32_s, bfloat16_s, expected in ((1.0, 2.0, "float32"), (2.0, 1.0, "bfloat16")):
        clock = Clock({torch.float32: float32_s, torch.bfloat16: bfloat16_s})
        monkeypatch.setattr(precision, "F", clock)
        monkeypatch.setattr(precision, "time", clock)
        assert precision.faster_dtype() == expected


def test_it_answers_on_this_machine() -> None:
    assert precision.faster_dtype() in ("float32", "bfloat16")
