"""Progress for TensorBoard and Weights & Biases, where they are installed.

Owns: Tracked, a Reporter that tells another one and the trackers. Refuses: configuring them; Weights & Biases reads its own
environment and settings. Both go on where a resumed run goes on: steps are numbered, and later ones are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import ConfigError
from llavakit.training.reporting import Reporter, StepRecord

__all__ = ["TRACKERS", "Tracked", "open_trackers"]

Write = Callable[[int, Mapping[str, float]], None]
Tracker = tuple[Write, Callable[[], None]]


class Tracked:
    """A reporter whose records also go to trackers."""

    def __init__(self, reporter: Reporter, trackers: Sequence[Tracker]) -> None:
        self._reporter, self._trackers = reporter, trackers

    def begin(self, first_step: int, steps: int) -> None:
        """Start at first_step."""
        self._reporter.begin(first_step, steps)

    def record(self, record: StepRecord) -> None:
        """Hear of a finished step."""
        self._reporter.record(record)
        values = {name: value for name, value in record.to_dict().items() if value is not None and name != "step"}
        for write, _ in self._trackers:
            write(record.step, values)

    def sync(self) -> None:
        """Make what was recorded durable."""
        self._reporter.sync()

    def close(self) -> None:
        """Let go of everything."""
        self._reporter.close()
        for _, close in self._trackers:
            close()


def open_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Open trackers by name. Raises: ConfigError where one is not installed."""
    return [TRACKERS[name](run_dir, config) for name in names]


def _tensorboard(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    del config  # it lies in the run folder
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tracking with TensorBoard needs it: pip install tensorboard") from error
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"train/{name}", value, step)

    return write, writer.close


def _wandb(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("tracking with Weights & Biases needs it: pip install wandb") from error
    # The folder's name is the run's id, so that a resumed run goes on in the same place.
    run = wandb.init(dir=str(run_dir), id=run_dir.resolve().name, resume="allow", config=dict(config))
    return lambda step, values: run.log(dict(values), step=step), run.finish


TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}
"""Trackers by name."""
