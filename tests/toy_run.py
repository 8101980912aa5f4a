"""A training run small enough for tests: a tiny decoder that learns to repeat a token.

Owns: the toy's samples, model, settings and a reporter that keeps its records.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore
from llavakit.model.surgery import init_weights
from llavakit.training.config import LoopConfig, OptimConfig, SaveConfig
from llavakit.training.data import Sample
from llavakit.training.objectives import PackedLoss
from llavakit.training.packing import PackedSource
from llavakit.training.reporting import StepRecord
from llavakit.training.trainer import Trainer

__all__ = ["Kept", "Repeats", "toy_config", "toy_core", "toy_source", "toy_trainer"]

NO_TILES = torch.empty(0, 3, 1, 1)


class Repeats:
    """Sample i is a drawn token, repeated a drawn number of times; all but the first are supervised."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def sample(self, index: int) -> Sample:
        rng = random.Random(f"{self.seed}/{index}")
        length = rng.randint(3, 9)
        return Sample((rng.randrange(2, 32),) * length, (False,) + (True,) * (length - 1), NO_TILES, ())


class Kept:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.events: list[str] = []

    def begin(self, first_step: int, steps: int) -> None:
        self.events.append(f"begin {first_step}/{steps}")

    def record(self, record: StepRecord) -> None:
        self.records.append(record)

    def sync(self) -> None:
        self.events.append("sync")

    def close(self) -> None:
        self.events.append("close")

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]


def toy_core(seed: int = 0) -> LlamaCore:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    core = LlamaCore(config)
    init_weights(core, 0.1, torch.Generator().manual_seed(seed))
    return core


def toy_source(seed: int = 0, *, samples_per_batch: int = 4) -> PackedSource:
    return PackedSource(Repeats(seed), samples_per_batch, multiple_of=1)


def toy_config(**changes: Any) -> LoopConfig:
    values = {
        "steps": 8,
        "optim": OptimConfig(lr=1e-2, clip_norm=1.0, warmup_steps=2),
        "workers": 0,
        "save": SaveConfig(every_s=1e9),
        **changes,
    }
    return LoopConfig(**values)


def toy_trainer(run_dir: Path, config: LoopConfig, *, seed: int = 0) -> tuple[Trainer, Kept]:
    reporter = Kept()
    return Trainer(toy_core(), PackedLoss(config.compute_dtype), toy_source(seed), config, reporter, run_dir), reporter
