"""What a server has done, for Prometheus.

Owns: Metrics. Invariant: no label comes from a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llavakit.engine.engine import Stats

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_COUNTED = (
    ("num_steps", "steps", "Steps of the engine"),
    ("num_tokens", "answer_tokens", "Tokens that answers were given"),
    ("num_preempted", "preemptions", "Requests that went back to wait"),
    ("num_sought_tokens", "prompt_tokens", "Prompt tokens of all started requests"),
    ("num_found_tokens", "prompt_cache_hits", "Prompt tokens that the cache held"),
    ("num_encoded_pictures", "pictures_encoded", "Pictures that the tower saw"),
    ("num_found_pictures", "picture_cache_hits", "Pictures whose features were kept"),
)
_STANDING = (
    ("num_running", "requests_running", "Requests that hold memory"),
    ("num_waiting", "requests_waiting", "Requests in the engine's queue"),
    ("num_blocks", "cache_blocks", "Blocks of the cache"),
    ("num_used_blocks", "cache_blocks_used", "Blocks of the cache in use"),
)


class Metrics:
    """A server's own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter("llava_responses", "Responses by route and status", ("route", "status"), registry=self.registry)
        self.latency = Histogram("llava_request_seconds", "Seconds of a request", ("route",), buckets=_SECONDS, registry=self.registry)
        self.first_token = Histogram("llava_first_token_seconds", "Seconds to the first token", buckets=_SECONDS, registry=self.registry)
        self.between_tokens = Histogram("llava_between_tokens_seconds", "Seconds between tokens", buckets=_SECONDS, registry=self.registry)
        self.refused = Counter("llava_pictures_refused", "Pictures that could not be decoded", registry=self.registry)
        self._engines = Gauge("llava_engines", "Engines whose counts these are", registry=self.registry)
        self._gauges = {
            field: Gauge(f"llava_{name}", text, registry=self.registry) for field, name, text in (*_COUNTED, *_STANDING)
        }  # of the engine's own counts, as they are when they are asked for

    def write(self, stats: Sequence[Stats]) -> bytes:
        """Write everything as text; the engines' counts are added up, and not a number where no engine tells them."""
        self._engines.set(len(stats))
        for field, gauge in self._gauges.items():
            gauge.set(sum(getattr(one, field) for one in stats) if stats else math.nan)
        return generate_latest(self.registry)
