"""Which dtype a processor multiplies fastest in, found out by doing it.

Owns: faster_dtype(). Names and flags do not tell: among processors that list AVX-512 BF16, some multiply bfloat16 four times as fast
as float32, others half as fast.
"""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch.nn import functional as F

__all__ = ["faster_dtype"]

_ROWS, _WIDTH = 2048, 512
_ROUNDS = 7


def faster_dtype() -> Literal["float32", "bfloat16"]:
    """Time a product of a training step's size on the CPU in both dtypes; takes about a tenth of a second."""
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    x, weight = torch.ones(_ROWS, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    for _ in range(_ROUNDS):
        for dtype in seconds:
            cast_x, cast_weight = x.to(dtype), weight.to(dtype)
            start = time.perf_counter()
            F.linear(cast_x, cast_weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return "float32" if seconds[torch.float32] <= seconds[torch.bfloat16] else "bfloat16"
