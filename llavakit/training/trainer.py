"""The training loop.

Owns: the order of things in a step. Batches (data), saves (state), schedule (optim) and records (reporting) are objects it calls.
Invariants: the loss is the sum over supervised positions of all microbatches divided by their number; after kill -9 at any
moment the same command continues with bit-identical losses; every run leaves its resolved config beside its metrics.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from llavakit.config import run_config_to_dict
from llavakit.errors import TrainingError
from llavakit.logs import logger
from llavakit.model.llava import LossTerms
from llavakit.model.surgery import freeze
from llavakit.storage.documents import write_json
from llavakit.training.config import TrainConfig
from llavakit.training.data import BatchSource, load_batches
from llavakit.training.optim import build_optimizers, clip_gradients, lr_scale, set_lr
from llavakit.training.reporting import MetricsLog, write_loss_curve
from llavakit.training.state import RunState, load_state, save_state

__all__ = ["Trainable", "train"]

_LOG = logger("training")
_MAX_BAD_STEPS = 3


class Trainable(Protocol):
    """A model that knows its loss: the only entry of training."""

    def loss_packed(self, batch: Any, *, dtype: torch.dtype | None = None) -> LossTerms:
        """Return the summed loss of a batch, activations in dtype."""
        ...


def train(model: nn.Module, source: BatchSource, config: TrainConfig, run_dir: Path) -> None:
    """Train a model in place, resuming from run_dir when it holds a save of the same run.

    Writes config.json, metrics.jsonl, loss.png and step-N saves into run_dir. Ctrl-C and SIGTERM save and raise.
    Raises: TrainingError when interrupted, when the loss is not finite three times in a row, or on other settings' saves.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    resolved = run_config_to_dict(config)
    write_json(run_dir / "config.json", resolved)
    for row in freeze(model, config.trainable):
        _LOG.info("training %s: %d tensors, %d parameters", row.pattern, row.num_tensors, row.num_parameters)
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    state = RunState(parameters, build_optimizers(parameters, config.optim))
    key = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()
    if load_state(state, run_dir, config_key=key):
        _LOG.info("resuming at step %d", state.step)
    if state.step < config.steps:
        _Loop(model, source, config, run_dir, state, key).run()
    write_loss_curve(run_dir / "metrics.jsonl", run_dir / "loss.png")


class _Loop:
    def __init__(self, model: Any, source: BatchSource, config: TrainConfig, run_dir: Path, state: RunState, key: str) -> None:
        self.model, self.config, self.run_dir, self.state, self.key = model, config, run_dir, state, key
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.compute_dtype]
        first, stop = state.step * config.microbatches, config.steps * config.microbatches
        self.batches = load_batches(source, first=first, stop=stop, workers=config.workers)
        self.log = MetricsLog(run_dir / "metrics.jsonl", first_step=state.step, steps=config.steps, log_every_s=config.log_every_s)
        self.wait_s, self.bad_steps = 0.0, 0

    def run(self) -> None:
        self.model.train()
        saved_at = time.monotonic()
        with _stop_signals() as stopped:
            while self.state.step < self.config.steps and not stopped:
                values = self._step()
                self.log.record(self.state.step, values, wait_s=self.wait_s)
                self.state.step += 1
                if time.monotonic() - saved_at >= self.config.save.every_s:
                    self._save()
                    saved_at = time.monotonic()
        self._save()
        self.log.close()
        self.model.eval()
        if stopped:
            raise TrainingError(f"stopped at step {self.state.step} of {self.config.steps} and saved; run the same command again to go on")

    def _step(self) -> dict[str, float]:
        config, parameters = self.config, list(self.state.parameters.values())
        lr = config.optim.lr * lr_scale(config.optim, self.state.step, config.steps)
        set_lr(self.state.optimizers, lr)
        total, weight = 0.0, 0
        counters: dict[str, int] = {}
        self.wait_s = 0.0
        for _ in range(config.microbatches):
            asked = time.monotonic()
            batch = next(self.batches)
            self.wait_s += time.monotonic() - asked
            terms: LossTerms = self.model.loss_packed(batch, dtype=self.dtype)
            terms.sum.backward()
            total, weight = total + float(terms.sum.detach()), weight + int(terms.weight)
            for name, value in terms.metrics.items():
                counters[name] = counters.get(name, 0) + int(value)
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], float(weight))
        norm = float(clip_gradients(parameters, config.optim.clip_norm))
        self._update(is_finite=math.isfinite(total) and math.isfinite(norm))
        shares = {name.removeprefix("num_"): value / max(1, counters[base]) for name, base, value in _shares(counters)}
        return {"loss": total / weight, "lr": lr, "grad_norm": norm, **shares}

    def _update(self, *, is_finite: bool) -> None:
        if is_finite:
            self.bad_steps = 0
            for optimizer in self.state.optimizers:
                optimizer.step()
        else:
            self.bad_steps += 1
            _LOG.warning("step %d: loss or gradient is not finite; update skipped", self.state.step)
            if self.bad_steps == _MAX_BAD_STEPS:
                raise TrainingError(f"loss or gradient was not finite {_MAX_BAD_STEPS} times in a row; lower the learning rate")
        for optimizer in self.state.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _save(self) -> None:
        save_state(self.state, self.run_dir, config_key=self.key, keep_last=self.config.save.keep_last)


def _shares(counters: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    """Pair each counter of right answers with the first counter, which says out of how many."""
    base = next(iter(counters), "")
    for name, value in counters.items():
        if name != base:
            yield name, base, value


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying from them: the loop looks after each step."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
