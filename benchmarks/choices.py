"""The measurements behind two choices of the training code on CPUs.

attention: the fused kernel in bfloat16, forward and backward, next to the same in float32 with the casts (ops/attention).
lengths: training steps of the miniature's decoder on batches of drawn lengths, next to lengths rounded up to multiples of 256
(training/packing). Ratios above 1 speak for float32 and for rounding up. Run: python -m benchmarks.choices [--rounds 7]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import alternate, write_result
from llavakit.model.llava import LlamaCore
from llavakit.model.surgery import init_weights
from llavakit.ops.attention import fused_attention
from llavakit.reproduce.miniature import miniature_config
from llavakit.training.data import Sample
from llavakit.training.packing import pack

ATTENTION_CASES = ((24, 4, 65, False), (1, 4, 150, True), (1, 4, 600, True))  # rows, heads, tokens, causal
REPEATS = 30
STEPS = 20


def main() -> None:
    """Measure and record both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    attention = [{"rows": case[0], "tokens": case[2], "is_causal": case[3], **attention_row(case, rounds)} for case in ATTENTION_CASES]
    core = LlamaCore(miniature_config().text_config)
    init_weights(core, 0.02, torch.Generator().manual_seed(0))
    (lengths,) = alternate(steps_run(core, 256), {"lengths as drawn": steps_run(core, 1)}, rounds)
    write_result("choices", "python -m benchmarks.choices", {"attention": attention, "lengths": lengths.to_row()})


def attention_row(case: tuple[int, int, int, bool], rounds: int) -> dict[str, Any]:
    """Compare the two ways on one shape."""
    num_rows, num_heads, num_tokens, is_causal = case
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, num_heads, num_tokens, 64)
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)]

    def timed(attend: Callable[..., torch.Tensor]) -> Callable[[], Sequence[float]]:
        def run() -> Sequence[float]:
            start = time.perf_counter()
            for _ in range(REPEATS):
                torch.autograd.grad(attend(*inputs, is_causal=is_causal).sum(), inputs)
            return ((time.perf_counter() - start) / REPEATS,)

        return run

    (comparison,) = alternate(timed(fused_attention), {"bfloat16 kernel": timed(F.scaled_dot_product_attention)}, rounds)
    return comparison.to_row()


def steps_run(core: LlamaCore, multiple_of: int) -> Callable[[], Sequence[float]]:
    """Return a run of forward and backward passes over batches that are new each time, as in training."""
    rng = random.Random(0)
    no_tiles = torch.empty(0, 3, 1, 1)

    def sample() -> Sample:
        length = rng.randint(90, 220)
        return Sample(tuple(rng.randrange(3, 700) for _ in range(length)), (False,) * 60 + (True,) * (length - 60), no_tiles, ())

    def run() -> Sequence[float]:
        batches = [pack([sample() for _ in range(12)], multiple_of=multiple_of) for _ in range(STEPS)]
        start = time.perf_counter()
        for batch in batches:
            core.loss_packed(batch, dtype=torch.bfloat16).sum.backward()
            core.zero_grad()
        return ((time.perf_counter() - start) / STEPS,)

    return run


if __name__ == "__main__":
    main()
