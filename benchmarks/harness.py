"""What every benchmark shares: alternating runs, medians, the machine, one result file each.

A comparison runs A B A B in one process, so that whatever else the machine does meets both. A ratio above 1 means that ours is
faster: it is the median over rounds of their seconds by ours in the same round.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "Comparison", "alternate", "machine_facts", "write_result"]

RESULTS = Path(__file__).parent / "results"
_CONTEST = 5


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds of ours and of each peer, round by round."""

    ours: tuple[float, ...]
    peers: Mapping[str, tuple[float, ...]]

    @property
    def best_peer(self) -> str:
        """The peer with the smallest median, of those that ran to the end."""
        finalists = [name for name, seconds in self.peers.items() if len(seconds) == len(self.ours)]
        return min(finalists, key=lambda name: statistics.median(self.peers[name]))

    @property
    def ratios(self) -> list[float]:
        """The best peer's seconds by ours, round by round."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.peers[self.best_peer], strict=True)]

    def to_row(self) -> dict[str, Any]:
        """Return what a result file holds."""
        medians = {name: round(statistics.median(seconds), 5) for name, seconds in self.peers.items()}
        return {
            "ours_s": round(statistics.median(self.ours), 5),
            "peers_s": medians,
            "best_peer": self.best_peer,
            "ratio": round(statistics.median(self.ratios), 3),
            "ratios": [round(ratio, 3) for ratio in sorted(self.ratios)],
        }


def alternate(ours: Callable[[], Sequence[float]], peers: Mapping[str, Callable[[], Sequence[float]]], rounds: int) -> list[Comparison]:
    """Run ours and the peers in turn, one round to warm up and then so many; the order turns round from round to round.

    Each callable returns the seconds of one or several measured parts; there is one comparison per part. A peer that was the fastest
    in no part after five rounds drops out.
    """
    runs = {"": ours, **peers}
    seconds: dict[str, list[Sequence[float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in sorted(runs, reverse=number % 2 == 1):
            gc.collect()
            measured = runs[name]()
            if number > 0:
                seconds[name].append(measured)
        if number == _CONTEST:
            medians = {name: [statistics.median(part) for part in zip(*seconds[name], strict=True)] for name in peers}
            best = {min(peers, key=lambda name: medians[name][part]) for part in range(len(seconds[""][0]))}
            runs = {name: run for name, run in runs.items() if not name or name in best}
    num_parts = len(seconds[""][0])
    parts = [{name: tuple(measured[part] for measured in rows) for name, rows in seconds.items()} for part in range(num_parts)]
    return [Comparison(part[""], {name: values for name, values in part.items() if name}) for part in parts]


def machine_facts() -> dict[str, Any]:
    """Name the processor, its threads, its accelerator and the versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def write_result(name: str, command: str, values: Mapping[str, Any]) -> None:
    """Write benchmarks/results/NAME.json with date and machine, and print it."""
    result = {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": machine_facts(), **values}
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
