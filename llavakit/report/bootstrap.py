"""Intervals for measured shares and means.

Owns: Wilson's interval for shares, the percentile bootstrap for means; both at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "bootstrap_interval", "wilson_interval"]

_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """Lower and upper end."""

    low: float
    high: float


def wilson_interval(right: int, total: int) -> Interval:
    """Return the 95 % interval of a share; (0, 1) when nothing was counted."""
    if total == 0:
        return Interval(0.0, 1.0)
    share = right / total
    center = share + _Z**2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    scale = 1 + _Z**2 / total
    low = 0.0 if right == 0 else (center - spread) / scale  # exact where rounding would not be
    high = 1.0 if right == total else (center + spread) / scale
    return Interval(low, high)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Return the 95 % percentile interval of the mean; the same seed gives the same interval."""
    if not values:
        raise ValueError("an interval needs at least one value")
    data = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = [data[rng.integers(0, len(data), len(data))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(low), float(high))
