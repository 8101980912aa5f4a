"""The training loop.

Owns: the order of things in a step. Batches (workers), the loss (objectives), updates (optim), saves (state) and records
(reporting) are objects that it calls.
Invariants: the loss is the sum over supervised positions of all microbatches divided by their number; after kill -9 at any
moment the same command continues with bit-identical losses; every run leaves its resolved config beside its metrics.
"""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from llavakit.config import run_config_to_dict
from llavakit.errors import DataError, TrainingError
from llavakit.logs import logger
from llavakit.model.surgery import freeze
from llavakit.storage.documents import write_json
from llavakit.training.config import LoopConfig
from llavakit.training.data import BatchSource, Drawn, batch_digest, moved
from llavakit.training.objectives import COMPUTE_DTYPES, Objective, PackedLoss
from llavakit.training.optim import build_optimizers, clip_gradients, lr_scale, plan_groups, set_lr
from llavakit.training.parallel import Alone, Parallel, whole
from llavakit.training.reporting import Reporter, RunReporter, StepRecord, write_loss_curve
from llavakit.training.state import RunState, Saves, run_lock
from llavakit.training.workers import BatchLoader

__all__ = ["TrainResult", "Trainer", "train"]

_LOG = logger("training")
_MAX_SKIPPED_IN_ROW = 3
_METRIC, _MASK = "metric ", (1 << 31) - 1
_GRACE_SAMPLES = 1000  # before this many samples one bad one more or less says nothing about the share


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a finished run went."""

    steps: int
    """Steps done in all."""
    first_step: int
    """Where this process began; above 0 when it resumed."""
    num_skipped: int
    """Updates left out because loss or gradient was not finite."""
    loss: float | None
    """Loss of the last step; None when the run was finished before."""


def train(model: nn.Module, source: BatchSource, config: LoopConfig, run_dir: Path) -> TrainResult:
    """Train a model on its own loss_packed in this process, resuming from run_dir, with the usual files and progress; see Trainer.

    Writes config.json, metrics.jsonl, loss.png and the saves into run_dir.
    """
    metrics = run_dir / "metrics.jsonl"
    reporter = RunReporter(metrics, log_every_s=config.log_every_s, is_terminal=sys.stderr.isatty())
    result = Trainer(model, PackedLoss(config.compute_dtype), source, config, reporter, run_dir).run()
    write_loss_curve(metrics, run_dir / "loss.png")
    return result


class Trainer:
    """Train a model in place; everything that is not the order of a step is done by the objects it is given."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        source: BatchSource,
        config: LoopConfig,
        reporter: Reporter,
        run_dir: Path,
        *,
        identity: Mapping[str, Any] = MappingProxyType({}),
        parallel: Parallel = Alone(),
        flops: Callable[[Any], float] | None = None,
    ) -> None:
        """Freeze what config does not train, distribute the model and build the optimisers.

        identity is what must be the same, besides config, for the run to go on; flops counts the operations of a batch.
        Of several processes all do the same, and the first one alone reports and owns the run folder.
        Raises: ConfigError when a pattern matches nothing.
        """
        self.model, self.objective, self.source, self.config, self.reporter = model, objective, source, config, reporter
        self.run_dir, self._flops, self.parallel = run_dir, flops, parallel
        self.device = next(model.parameters()).device
        freeze(model, config.trainable)
        parallel.shard(model, COMPUTE_DTYPES[config.compute_dtype], objective.entries)
        parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if parallel.rank == 0:
            _LOG.info("%s", _table(model, parameters, config))
        self.state = RunState(parameters, build_optimizers(parameters, config.optim, dtype=COMPUTE_DTYPES[config.compute_dtype]))
        shapes = {name: tuple(weight.shape) for name, weight in parameters.items()}
        own = {**identity, **config.identity(), "parameters": shapes}
        self.saves = Saves(run_dir, identity=own, keep_last=config.save.keep_last, parallel=parallel)

    def run(self) -> TrainResult:
        """Train to the last step, from the newest save in run_dir when there is one.

        Ctrl-C and SIGTERM finish the step, save and raise; a second one raises KeyboardInterrupt at once.
        Raises: TrainingError when interrupted, when loss or gradient is not finite three times in a row, when run_dir is in use
        or belongs to a run with other settings or data; DataError and StorageError as they come.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with run_lock(self.run_dir) if self.parallel.rank == 0 else contextlib.nullcontext():
            self.parallel.wait()
            if self.saves.restore_newest(self.state):
                self._check_data()
                _LOG.info("resuming at step %d", self.state.step)
            if self.parallel.rank == 0:
                write_json(self.run_dir / "config.json", run_config_to_dict(self.config))
            first_step, loss = self.state.step, None
            if first_step < self.config.steps:
                loss = self._train()
        return TrainResult(self.state.step, first_step, self.state.num_skipped, loss)

    def _check_data(self) -> None:
        """Refuse to go on with other data: the source must still give the batch that the save saw last."""
        if self._digest() != self.state.batch_digest:
            raise TrainingError(
                f"{self.run_dir} was trained on other data (the last batch of step {self.state.step - 1} differs); "
                "use another folder, or remove it to start over"
            )

    def _digest(self) -> str:
        """Digest the last batch of the steps so far, whichever process it was for."""
        return batch_digest(self.source.batch(self.state.step * self.config.microbatches - 1).batch)

    def _numbers(self) -> list[int]:
        """List the batches of this process from here to the end: as many in every process, so some may come twice (see _gradients)."""
        size, count = self.parallel.size, self.config.microbatches
        places = [min(first + self.parallel.rank, count - 1) for first in range(0, count, size)]
        return [step * count + place for step in range(self.state.step, self.config.steps) for place in places]

    def _train(self) -> float:
        self.model.train()
        saved_at, loss, is_first = time.monotonic(), math.nan, self.parallel.rank == 0
        with BatchLoader(self.source, self._numbers(), workers=self.config.workers) as batches, _stop_signals() as received:
            if is_first:
                self.reporter.begin(self.state.step, self.config.steps)
            is_stopping = False
            try:
                while self.state.step < self.config.steps and not is_stopping:
                    is_due = is_first and time.monotonic() - saved_at >= self.config.save.every_s
                    record, is_stopping, is_due = self._step(batches, received, is_due=is_due)
                    if is_first:
                        self.reporter.record(record)
                    self.state.step, loss = self.state.step + 1, record.loss
                    if is_due or is_stopping or self.state.step == self.config.steps:
                        self._save()
                        saved_at = time.monotonic()
            finally:
                if is_first:
                    self.reporter.close()
        self.model.eval()
        if self.state.step < self.config.steps:
            raise TrainingError(f"stopped at step {self.state.step} of {self.config.steps} and saved; run the same command again to go on")
        return loss

    def _save(self) -> None:
        if self.parallel.rank == 0:
            self.reporter.sync()
            self.state.batch_digest = self._digest()
        self.saves.write(self.state)

    def _step(self, batches: Iterator[Drawn], received: Sequence[int], *, is_due: bool) -> tuple[StepRecord, bool, bool]:
        """Train one step; returns what it was like, whether somebody wants to stop, and whether it is time to save."""
        began = time.monotonic()
        tally, wait_s = self._gradients(batches)
        tally |= {"stop": float(bool(received)), "due": float(is_due)}
        summed = dict(zip(tally, self.parallel.summed(list(tally.values())), strict=True))
        self._count_samples(int(summed["num_samples"]), int(summed["num_left_out"]))
        loss, weight, scale = summed["loss"], summed["weight"], lr_scale(self.config.optim, self.state.step, self.config.steps)
        grad_norm = self._update(scale, weight, is_finite=math.isfinite(loss))
        record = StepRecord(
            step=self.state.step,
            loss=loss / weight,
            lr=self.config.optim.lr * scale,
            grad_norm=grad_norm,
            shares=_shares({name.removeprefix(_METRIC): value for name, value in summed.items() if name.startswith(_METRIC)}),
            num_tokens=int(summed["num_tokens"]),
            num_samples=int(summed["num_samples"]),
            flops=summed["flops"],
            memory_bytes=_peak_memory(self.device),
            wait_s=wait_s,
            step_s=time.monotonic() - began,
        )
        return record, summed["stop"] > 0, summed["due"] > 0

    def _gradients(self, batches: Iterator[Drawn]) -> tuple[dict[str, float], float]:
        """Run this process's batches of a step forward and backward; returns what they add to the step, and the seconds waited for them.

        Where there are more processes than batches are left, a batch is run again for nothing, since all must make the same calls.
        """
        tally = dict.fromkeys(("loss", "weight", "num_tokens", "num_samples", "num_left_out", "flops"), 0.0)
        wait_s, count = 0.0, self.config.microbatches
        for place in range(self.parallel.rank, -(-count // self.parallel.size) * self.parallel.size, self.parallel.size):
            asked = time.monotonic()
            drawn = next(batches)
            wait_s += time.monotonic() - asked
            # What is drawn (dropout) depends on the batch alone, so a resumed run, or one of other processes, draws the same.
            torch.manual_seed(((self.config.seed & _MASK) << 32) + self.state.step * count + min(place, count - 1))
            terms = self.objective.loss(self.model, moved(drawn.batch, self.device))
            share = float(place < count)
            if terms.sum.requires_grad:  # a batch of text says nothing of a projector that trains alone
                (terms.sum * share).backward()
            for reason in drawn.left_out if share else ():
                _LOG.warning("step %d: a sample is left out: %s", self.state.step, reason)
            added = {"loss": float(terms.sum.detach()), "weight": float(terms.weight)}  # waits for the device
            added |= {"num_tokens": drawn.num_tokens, "num_samples": drawn.num_samples, "num_left_out": len(drawn.left_out)}
            added["flops"] = 0.0 if self._flops is None else self._flops(drawn.batch)
            added |= {f"{_METRIC}{name}": float(value) for name, value in terms.metrics.items()}
            for name, value in added.items():
                tally[name] = tally.get(name, 0.0) + (value if share else 0.0)
        return tally, wait_s

    def _count_samples(self, num_samples: int, num_left_out: int) -> None:
        """Count samples that could not be built. Raises: DataError when their share is above max_bad_share."""
        state = self.state
        state.num_samples += num_samples + num_left_out
        state.num_left_out += num_left_out
        most = self.config.max_bad_share * max(state.num_samples, _GRACE_SAMPLES)
        if num_left_out and state.num_left_out > most:
            raise DataError(
                f"{state.num_left_out} of {state.num_samples} samples could not be built (each is told above); at most a share of "
                f"{self.config.max_bad_share} may be left out (data.max_bad_share); llava data check shows them all"
            )

    def _update(self, scale: float, weight: float, *, is_finite: bool) -> float:
        """Turn the summed gradient into a mean, clip it and step; returns its norm before clipping."""
        if weight == 0:
            raise DataError(f"step {self.state.step} has no supervised position; check the samples' answers")
        parameters = list(self.state.parameters.values())
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], weight)
        grad_norm = float(whole(clip_gradients(parameters, self.config.optim.clip_norm)))
        if is_finite and math.isfinite(grad_norm):
            self.state.num_skipped_in_row = 0
            set_lr(self.state.optimizers, scale)
            for optimizer in self.state.optimizers:
                optimizer.step()
        else:
            self._skip()
        for parameter in parameters:
            parameter.grad = None
        return grad_norm

    def _skip(self) -> None:
        state = self.state
        state.num_skipped, state.num_skipped_in_row = state.num_skipped + 1, state.num_skipped_in_row + 1
        _LOG.warning("step %d: loss or gradient is not finite; update skipped", state.step)
        if state.num_skipped_in_row == _MAX_SKIPPED_IN_ROW:
            raise TrainingError(
                f"loss or gradient was not finite {_MAX_SKIPPED_IN_ROW} times in a row, last at step {state.step}; lower the learning rate"
            )


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes that a GPU gave this process, or that a process on the CPU took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(model: nn.Module, parameters: Mapping[str, Parameter], config: LoopConfig) -> str:
    """Say what trains, and how: a line per group of parameters."""
    rows = [("pattern", "tensors", "parameters", "learning rate", "decay")]
    for group in plan_groups(parameters, config.optim):
        count = sum(parameters[name].numel() for name in group.names)
        rows.append((group.pattern, str(len(group.names)), f"{count:,}", f"{group.lr:g}", f"{group.weight_decay:g}"))
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    rows.append(("(frozen)", str(len(frozen)), f"{sum(weight.numel() for weight in frozen):,}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    clipping = (
        "gradients are not clipped" if config.optim.clip_norm is None else f"gradients are clipped to a norm of {config.optim.clip_norm:g}"
    )
    return "\n".join([f"what trains ({config.optim.name}; {clipping}):", *lines])


def _shares(counters: Mapping[str, float]) -> dict[str, float]:
    """Divide each counter by the first one, which says out of how many."""
    if not counters:
        return {}
    base, *others = counters
    return {name.removeprefix("num_"): counters[name] / max(1, counters[base]) for name in others}


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of dying from it: the loop looks after each step. A second one interrupts."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
