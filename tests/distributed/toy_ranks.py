"""A run that one process or torchrun's ranks do: python -m tests.distributed.toy_ranks RUN_DIR [--stop-at N] [--die-at N] [--kind KIND].

Trains a tiny LLaVA whose batches often hold no picture, three batches a step, and writes the losses of this call to RUN_DIR/losses.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from llavakit.errors import TrainingError
from llavakit.model.llava import LlavaCore, LossTerms
from llavakit.model.lora_config import LoraConfig
from llavakit.model.surgery import add_lora, init_weights, quantize
from llavakit.ops.loss import linear_cross_entropy
from llavakit.training.config import LoopConfig, OptimConfig, SaveConfig
from llavakit.training.data import Sample
from llavakit.training.objectives import PackedLoss
from llavakit.training.packing import PackedSource
from llavakit.training.parallel import Parallel, join_ranks
from llavakit.training.trainer import Trainer
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE, llava_config
from tests.toy_run import Kept

STEPS = 20
TRAINABLE = {
    "projector and language model": ("multi_modal_projector.*", "language_model.*"),
    "everything": ("*",),
    "packed": ("*.lora_?", "multi_modal_projector.*"),
}


class Mixed:
    """Sample i: every third one has a picture, the others are text; answers differ in length."""

    def sample(self, index: int) -> Sample:
        rng = random.Random(index)
        answer = tuple(rng.randrange(3, 300) for _ in range(rng.randint(2, 12)))
        generator = torch.Generator().manual_seed(index)
        has_picture = index % 3 == 0
        slots = (IMAGE_TOKEN,) * NUM_IMAGE_TOKENS if has_picture else ()
        tiles = torch.rand(int(has_picture), 3, SIDE, SIDE, generator=generator)
        grids = (llava_config().image_grid,) * int(has_picture)
        return Sample((1, *slots, *answer), (False,) * (1 + len(slots)) + (True,) * len(answer), tiles, grids)


class Stopping:
    """The usual objective; after so many calls the first process asks itself to stop, or the last one is killed."""

    entries: ClassVar[tuple[str, ...]] = ("loss_packed",)

    def __init__(self, parallel: Parallel, after: int | None, kind: signal.Signals) -> None:
        self.loss_of = PackedLoss("float32", touches_all=parallel.size > 1)
        is_struck = parallel.rank == (0 if kind == signal.SIGTERM else parallel.size - 1)
        self.left, self.kind = after if is_struck else None, kind

    def loss(self, model: Any, batch: Any) -> LossTerms:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.kind)
        return self.loss_of.loss(model, batch)


def model(*, is_packed: bool = False) -> LlavaCore:
    """Build the tiny LLaVA; packed its products are NF4 with double scales, and LoRA trains beside them."""
    core = LlavaCore(llava_config())
    init_weights(core, 0.1, torch.Generator().manual_seed(0))
    if is_packed:
        quantize(core, "nf4", torch.device("cpu"), has_double_scales=True)
        add_lora(core, LoraConfig(rank=4, alpha=8.0, dropout=0.1), torch.Generator().manual_seed(1))
    return core


def run(
    run_dir: Path, parallel: Parallel, *, stop_at: int | None = None, die_at: int | None = None, kind: str = "projector and language model"
) -> list[float]:
    """Train to the end, or until somebody stops or dies in a step; returns the losses of this call. A run that may die saves every step."""
    config = LoopConfig(
        steps=STEPS,
        optim=OptimConfig(lr=3e-3, clip_norm=1.0, weight_decay=0.1, warmup_steps=2),
        trainable=TRAINABLE[kind],
        microbatches=3,
        workers=0,
        save=SaveConfig(every_s=1e9 if die_at is None else 0.0),
    )
    calls = -(-config.microbatches // parallel.size)
    reporter = Kept()
    struck_by = signal.SIGTERM if die_at is None else signal.SIGKILL
    after = stop_at if die_at is None else die_at
    objective = Stopping(parallel, None if after is None else after * calls, struck_by)
    core = model(is_packed=kind == "packed")
    trainer = Trainer(core, objective, PackedSource(Mixed(), 2, multiple_of=1), config, reporter, run_dir, parallel=parallel)
    # Few rows a chunk, so that ranks go through the head's loop different numbers of times.
    in_chunks = functools.partial(linear_cross_entropy, chunk_rows=4)
    stopping = contextlib.suppress(TrainingError) if stop_at is not None else contextlib.nullcontext()
    with stopping, mock.patch("llavakit.model.llava.linear_cross_entropy", in_chunks):
        trainer.run()
    return reporter.losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--shard-ranks", type=int)
    parser.add_argument("--kind", choices=TRAINABLE, default="projector and language model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel = join_ranks(os.environ)
    parallel.replicate(options.shard_ranks)
    die_at = options.die_at if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None
    losses = run(options.run_dir, parallel, stop_at=options.stop_at, die_at=die_at, kind=options.kind)
    if parallel.rank == 0:
        (options.run_dir / "losses.json").write_text(json.dumps(losses))
    parallel.leave()


if __name__ == "__main__":
    main()
