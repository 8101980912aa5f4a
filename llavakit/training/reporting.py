"""What a run tells: metrics.jsonl, progress, the loss curve.

Owns: the Reporter protocol and RunReporter. The metrics are cut back to the step that a resumed run starts from, so that no step
is missing or recorded twice. Progress goes to stderr: a live line on a terminal, else a log record every few seconds.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llavakit.errors import TrainingError
from llavakit.logs import logger
from llavakit.report.plots import Series, line_plot

__all__ = ["Reporter", "RunReporter", "StepRecord", "write_loss_curve"]

_LOG = logger("training")
_SMOOTH_STEPS = 50
_UNSHOWN = ("step", "wait_share")
_ONLY_LOGGED = ("grad_norm", "samples_per_s", "tflops_per_s", "memory_gb")  # a terminal's line is short


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One finished step, counted from 0."""

    step: int
    loss: float
    """Mean over the step's supervised positions."""
    lr: float
    grad_norm: float
    shares: Mapping[str, float]
    """Right answers and the like, as shares."""
    num_tokens: int
    """Tokens of the step; 0 where the objective counts none."""
    num_samples: int
    """Sequences of the step; 0 where the objective counts none."""
    flops: float
    """Operations of the step's products; 0 where nobody counts them."""
    memory_bytes: int
    """Most memory that was taken so far: of the GPU, else of the process."""
    wait_s: float
    """Seconds spent waiting for batches."""
    step_s: float
    """Seconds of the whole step."""

    def to_dict(self) -> dict[str, float | None]:
        """Return the line of metrics.jsonl; what is not finite is null."""
        values = {"step": self.step, "loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm, **self.shares}
        if self.num_tokens:
            values |= {"tokens_per_s": self.num_tokens / self.step_s, "samples_per_s": self.num_samples / self.step_s}
        if self.flops:
            values["tflops_per_s"] = self.flops / self.step_s / 1e12
        values["memory_gb"] = self.memory_bytes / 1e9
        values["wait_share"] = self.wait_s / self.step_s
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Reporter(Protocol):
    """Who hears of a run's progress; begin comes first, close last, also after an error."""

    def begin(self, first_step: int, steps: int) -> None:
        """Start at first_step (above 0 when resuming) of steps; forget later steps."""
        ...

    def record(self, record: StepRecord) -> None:
        """Hear of a finished step."""
        ...

    def sync(self) -> None:
        """Make what was recorded durable; called before each save."""
        ...

    def close(self) -> None:
        """Write out and let go of everything."""
        ...


class RunReporter:
    """Append a line of JSON per step and show progress."""

    def __init__(self, metrics: Path, *, log_every_s: float, is_terminal: bool, peak_flops: float | None = None) -> None:
        """Take the operations per second that the device could do, where their share is to be shown."""
        self._path, self._every_s, self._is_terminal, self._peak = metrics, log_every_s, is_terminal, peak_flops
        self._file: IO[bytes] | None = None
        self._live: _LiveLine | None = None
        self._steps, self._first_step, self._wait_s = 0, 0, 0.0
        self._started = self._shown = 0.0

    def begin(self, first_step: int, steps: int) -> None:
        """Cut the metrics back to first_step. Raises: TrainingError when earlier steps are missing from them."""
        offset = _offset_of_step(self._path, first_step)
        self._file = self._path.open("ab")
        self._file.truncate(offset)
        self._steps, self._first_step, self._wait_s = steps, first_step, 0.0
        self._started = self._shown = time.monotonic()
        if self._is_terminal:
            self._live = _LiveLine(first_step, steps)

    def record(self, record: StepRecord) -> None:
        """Write the step's line at once, so that a killed process loses none."""
        assert self._file is not None, "begin comes first"
        values = record.to_dict()
        if self._peak is not None and record.flops:
            values["mfu"] = record.flops / record.step_s / self._peak
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()
        self._wait_s += record.wait_s
        if self._live is not None:
            self._live.update(values)
        elif (now := time.monotonic()) - self._shown >= self._every_s or record.step + 1 == self._steps:
            self._shown = now
            self._log(record.step, values, now - self._started)

    def sync(self) -> None:
        """Make the metrics durable."""
        assert self._file is not None, "begin comes first"
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the metrics and end the live line."""
        if self._file is not None:
            self._file.close()
        if self._live is not None:
            self._live.stop()

    def _log(self, step: int, values: Mapping[str, float | None], spent_s: float) -> None:
        rate = (step + 1 - self._first_step) / spent_s
        _LOG.info(
            "step %d/%d  %s  %.2f steps/s  waiting %.0f %%  %.0f s left",
            step + 1, self._steps, _words(values), rate, 100 * self._wait_s / spent_s, (self._steps - step - 1) / rate,
        )  # fmt: skip


class _LiveLine:
    def __init__(self, first_step: int, steps: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID = self._progress.add_task("", total=steps, completed=first_step)
        self._progress.start()

    def update(self, values: Mapping[str, float | None]) -> None:
        shown = {name: value for name, value in values.items() if name not in _ONLY_LOGGED}
        self._progress.update(self._task, advance=1, description=_words(shown))

    def stop(self) -> None:
        self._progress.stop()


def write_loss_curve(metrics: Path, picture: Path) -> None:
    """Draw the smoothed loss of metrics.jsonl as a PNG; steps whose loss was not finite are left out."""
    lines = [line for line in _lines(metrics) if line["loss"] is not None]
    points = []
    for start in range(0, len(lines), _SMOOTH_STEPS):
        window = lines[start : start + _SMOOTH_STEPS]
        points.append((float(window[-1]["step"] + 1), sum(line["loss"] for line in window) / len(window)))
    picture.write_bytes(line_plot([Series("loss", tuple(points))], title="Training loss", x_label="step", y_label="loss"))


def _words(values: Mapping[str, float | None]) -> str:
    """Write a line's values in few digits; the step stands elsewhere."""
    return "  ".join(f"{name} {math.nan if value is None else value:.4g}" for name, value in values.items() if name not in _UNSHOWN)


def _offset_of_step(metrics: Path, step: int) -> int:
    """Count the bytes of the lines of the steps before step."""
    text = metrics.read_bytes() if metrics.is_file() else b""
    offset = 0
    for _ in range(step):
        end = text.find(b"\n", offset)
        if end < 0:
            raise TrainingError(f"{metrics} lacks steps before {step}, where the run resumes; put the file back, or remove the run folder")
        offset = end + 1
    return offset


def _lines(metrics: Path) -> list[dict[str, Any]]:
    text = metrics.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]  # what follows the last line break is torn
