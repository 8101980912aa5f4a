"""What a run tells: metrics.jsonl, progress lines, the loss curve.

Owns: MetricsLog, cut back to the step that a resumed run starts from, so that no step is recorded twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from llavakit.logs import logger
from llavakit.report.plots import Series, line_plot

__all__ = ["MetricsLog", "write_loss_curve"]

_LOG = logger("training")
_SMOOTH_STEPS = 50


class MetricsLog:
    """Append a line of JSON per step; print a line to the log every few seconds."""

    def __init__(self, path: Path, *, first_step: int, steps: int, log_every_s: float) -> None:
        self._path, self._steps, self._every_s = path, steps, log_every_s
        kept = [line for line in _lines(path) if line["step"] < first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._started, self._first_step = time.monotonic(), first_step
        self._last_line, self._wait_s = self._started, 0.0

    def record(self, step: int, values: Mapping[str, float], *, wait_s: float) -> None:
        """Record one finished step and the seconds it waited for its batch."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._wait_s += wait_s
        now = time.monotonic()
        if now - self._last_line >= self._every_s or step + 1 == self._steps:
            self._last_line = now
            self._file.flush()
            spent = now - self._started
            rate = (step + 1 - self._first_step) / spent
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            _LOG.info(
                "step %d/%d  %s  %.2f steps/s  waiting %.0f %%  %.0f s left",
                step + 1, self._steps, shown, rate, 100 * self._wait_s / spent, (self._steps - step - 1) / rate,
            )  # fmt: skip

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()


def write_loss_curve(metrics: Path, picture: Path) -> None:
    """Draw the smoothed loss of metrics.jsonl as a PNG."""
    lines = _lines(metrics)
    points = []
    for start in range(0, len(lines), _SMOOTH_STEPS):
        window = lines[start : start + _SMOOTH_STEPS]
        points.append((float(window[-1]["step"] + 1), sum(line["loss"] for line in window) / len(window)))
    picture.write_bytes(line_plot([Series("loss", tuple(points))], title="Training loss", x_label="step", y_label="loss"))


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is torn
    return [json.loads(line) for line in lines]
