"""A run that one process or torchrun's ranks can do: python -m tests.distributed.toy_ranks RUN_DIR [--stop-at STEP] [--die-at STEP].

Trains a tiny LLaVA whose batches often hold no picture, three batches a step, and writes the losses of this call to RUN_DIR/losses.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
from pathlib import Path
from typing import Any, ClassVar

import torch

from llavakit.errors import TrainingError
from llavakit.model.llava import LlavaCore, LossTerms
from llavakit.model.surgery import init_weights
from llavakit.training.config import LoopConfig, OptimConfig, SaveConfig
from llavakit.training.data import Sample
from llavakit.training.objectives import PackedLoss
from llavakit.training.packing import PackedSource
from llavakit.training.parallel import Parallel, join_ranks
from llavakit.training.trainer import Trainer
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE, llava_config
from tests.toy_run import Kept

STEPS = 20


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


def model() -> LlavaCore:
    core = LlavaCore(llava_config())
    init_weights(core, 0.1, torch.Generator().manual_seed(0))
    return core


def run(
    run_dir: Path, parallel: Parallel, *, stop_at: int | None = None, die_at: int | None = None, trains_tower: bool = False
) -> list[float]:
    """Train to the end, or until somebody stops or dies in a step; returns the losses of this call. A run that may die saves every step."""
    trainable = ("*",) if trains_tower else ("multi_modal_projector.*", "language_model.*")
    config = LoopConfig(
        steps=STEPS,
        optim=OptimConfig(lr=3e-3, clip_norm=1.0, weight_decay=0.1, warmup_steps=2),
        trainable=trainable,
        microbatches=3,
        workers=0,
        save=SaveConfig(every_s=1e9 if die_at is None else 0.0),
    )
    calls = -(-config.microbatches // parallel.size)
    reporter = Kept()
    kind = signal.SIGTERM if die_at is None else signal.SIGKILL
    after = stop_at if die_at is None else die_at
    objective = Stopping(parallel, None if after is None else after * calls, kind)
    trainer = Trainer(model(), objective, PackedSource(Mixed(), 2, multiple_of=1), config, reporter, run_dir, parallel=parallel)
    with contextlib.suppress(TrainingError) if stop_at is not None else contextlib.nullcontext():
        trainer.run()
    return reporter.losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--shard-ranks", type=int)
    parser.add_argument("--trains-tower", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel = join_ranks(os.environ)
    parallel.replicate(options.shard_ranks)
    die_at = options.die_at if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None
    losses = run(options.run_dir, parallel, stop_at=options.stop_at, die_at=die_at, trains_tower=options.trains_tower)
    if parallel.rank == 0:
        (options.run_dir / "losses.json").write_text(json.dumps(losses))
    parallel.leave()


if __name__ == "__main__":
    main()
