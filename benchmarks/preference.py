"""What it saves that two answers share their prompt.

attention: a further branch by masked attention, next to attention of the stem's queries too (ops/branches; the first is for CPUs, the
second for other devices), forward and backward, heads grouped in the last case
step: forward and backward of pairs that share 631 tokens (LLaVA-1.5's picture and a question), next to the same answers as sequences of
their own: seconds, tokens, on a GPU peak memory too, and how far the sums differ

Ratios above 1 speak for masks and for sharing. Run: python -m benchmarks.preference [--device cuda] [--rounds 7]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import alternate, write_result
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import AnswerBatch, LlamaCore
from llavakit.model.surgery import init_weights
from llavakit.ops.branches import attend_masked, attend_whole
from llavakit.training.preference import Answered, PreferenceSample, pack_pairs

ATTENTION_CASES = ((60, 200, 8, 8), (600, 20, 8, 8), (600, 100, 8, 8), (600, 400, 8, 2))  # before, after, heads, key-value heads
PROMPT, ANSWERS, VOCAB = 631, (40, 160), 32000
REPEATS = 10
SHAPES = {"cpu": {"width": 512, "layers": 4, "pairs": 2}, "cuda": {"width": 4096, "layers": 8, "pairs": 8}}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def main() -> None:
    """Measure and record both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    names = ("before", "after", "heads", "kv_heads")
    attention = [{**dict(zip(names, case, strict=True)), **attention_row(case, device, options.rounds)} for case in ATTENTION_CASES]
    values = {"attention": attention, "step": step_row(device, options.rounds)}
    name = "preference" if options.device == "cpu" else "preference_gpu"
    write_result(name, f"python -m benchmarks.preference --device {options.device}", values)


def attention_row(case: tuple[int, int, int, int], device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare the two ways on one shape."""
    before, after, heads, kv_heads = case
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        drawn = torch.randn(before + after, num_heads, 64, generator=generator)
        return drawn.to(device, DTYPES[device.type]).requires_grad_()

    inputs = (draw(heads), draw(kv_heads), draw(kv_heads))

    def timed(attend: Callable[..., Tensor]) -> Callable[[], Sequence[float]]:
        def run() -> Sequence[float]:
            start = time.perf_counter()
            for _ in range(REPEATS):
                torch.autograd.grad(attend(*inputs, before).sum(), inputs)
            wait(device)
            return ((time.perf_counter() - start) / REPEATS,)

        return run

    (comparison,) = alternate(timed(attend_masked), {"stem's queries too": timed(attend_whole)}, rounds)
    return comparison.to_row()


def step_row(device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare pairs that share their prompt with sequences of their own."""
    shape = SHAPES[device.type]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape["width"],
        intermediate_size=shape["width"] * 11 // 4,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["width"] // 64,
    )
    core = LlamaCore(config)
    init_weights(core, 0.02, torch.Generator().manual_seed(0))
    core.to(device)
    samples = draw_samples(shape["pairs"])
    batches = {"shared": pack_pairs(samples), "separate": separated(samples)}
    moved = {name: on_device(batch, device) for name, batch in batches.items()}
    sums = {name: core.logprobs_packed(batch, dtype=DTYPES[device.type]).detach() for name, batch in moved.items()}
    runs = {name: step_run(core, batch, device) for name, batch in moved.items()}
    (comparison,) = alternate(runs["shared"], {"separate": runs["separate"]}, rounds)
    return {
        **shape,
        "tokens": {name: batch.ids_T.numel() for name, batch in batches.items()},
        "peak_gb": {name: peak_gb(run, device) for name, run in runs.items()},
        "largest_difference": float((sums["shared"] - sums["separate"]).abs().max()),
        "mean_sum": float(sums["separate"].mean()),
        **comparison.to_row(),
    }


def draw_samples(count: int) -> list[PreferenceSample]:
    """Draw text-only pairs of the lengths of pairs with a picture."""
    rng = random.Random(0)
    samples = []
    for _ in range(count):
        prompt, *answers = (
            [rng.randrange(3, VOCAB) for _ in range(length)] for length in (PROMPT, rng.randint(*ANSWERS), rng.randint(*ANSWERS))
        )
        chosen, rejected = (Answered((*prompt, *ids), (False,) * PROMPT + (True,) * len(ids)) for ids in answers)
        samples.append(PreferenceSample(chosen, rejected, torch.empty(0, 3, 1, 1), ()))
    return samples


def separated(samples: Sequence[PreferenceSample]) -> AnswerBatch:
    """Pack each answer behind a prompt of its own."""
    answers = [answered for sample in samples for answered in (sample.chosen, sample.rejected)]
    lengths = torch.tensor([len(answered.ids) for answered in answers])
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    learned = [place for place, counts in enumerate(flag for answered in answers for flag in answered.loss_mask) if counts]
    ids_T = torch.tensor([index for answered in answers for index in answered.ids])
    return AnswerBatch(
        ids_T=ids_T,
        positions_T=torch.cat([torch.arange(len(answered.ids)) for answered in answers]),
        cu_seqlens=bounds.int(),
        stems_B=torch.full_like(lengths, -1),
        rows_M=torch.tensor(learned) - 1,
        labels_M=ids_T[torch.tensor(learned)],
        lengths_A=lengths - PROMPT,
    )


def on_device(batch: AnswerBatch, device: torch.device) -> AnswerBatch:
    """Return the batch with its tensors on a device."""
    names = ("ids_T", "positions_T", "cu_seqlens", "stems_B", "rows_M", "labels_M", "lengths_A")
    return AnswerBatch(**{name: getattr(batch, name).to(device) for name in names})


def step_run(core: LlamaCore, batch: AnswerBatch, device: torch.device) -> Callable[[], Sequence[float]]:
    """Return a run of forward and backward."""

    def run() -> Sequence[float]:
        start = time.perf_counter()
        core.logprobs_packed(batch, dtype=DTYPES[device.type]).sum().backward()
        core.zero_grad()
        wait(device)
        return (time.perf_counter() - start,)

    return run


def peak_gb(run: Callable[[], Sequence[float]], device: torch.device) -> float | None:
    """Return what a run allocates at most, weights included; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
