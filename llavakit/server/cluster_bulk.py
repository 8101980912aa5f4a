"""Many questions answered by replicas on Ray Data.

Owns: cluster_answers. Questions go out by number in small batches; pictures are read where they are answered, so their files must be
reachable there. Ray asks a batch again whose replica is gone, and the journal (engine/bulk) keeps each answer once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llavakit.engine.bulk import Answers, Questions, answer_row
from llavakit.engine.llm import LLM
from llavakit.errors import ConfigError
from llavakit.server.config import ClusterConfig
from llavakit.types import SamplingParams

__all__ = ["Answerer", "cluster_answers"]

_BATCH = 32


class Answerer:
    """A model that answers batches of questions by their numbers."""

    def __init__(self, load: Callable[[], LLM], questions: Questions, params: SamplingParams, adapter: str) -> None:
        """Load the model."""
        self._llm, self._questions, self._params, self._adapter = load(), questions, params, adapter

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer a batch: its column number, and in return the same with the answers as JSON."""
        numbers = [int(number) for number in batch["number"]]
        builders = [functools.partial(self._questions.conversation, number) for number in numbers]
        rows = dict(self._llm.chat_each(builders, self._params, adapter=self._adapter))
        return {"number": numbers, "answer": [json.dumps(answer_row(rows[place])) for place in range(len(numbers))]}


def cluster_answers(
    load: Callable[[], LLM], questions: Questions, params: SamplingParams, cluster: ClusterConfig, *, adapter: str = ""
) -> Answers:
    """Answer with replicas on Ray. Raises: ConfigError without it."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("replicas need Ray: pip install 'llavakit[ray]'") from error

    def answers(numbers: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if not numbers:
            return
        ray.init(cluster.ray_address, include_dashboard=False, log_to_driver=False)
        try:
            blocks = max(1, -(-len(numbers) // _BATCH))
            asked = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=blocks)
            answered = asked.map_batches(
                Answerer,
                fn_constructor_args=(load, questions, params, adapter),
                batch_size=_BATCH,
                concurrency=(cluster.replicas, cluster.most_replicas),
                num_cpus=cluster.replica_cpus,
                num_gpus=cluster.replica_gpus,
            )
            for row in answered.iter_rows():
                yield int(row["number"]), json.loads(row["answer"])
        finally:
            ray.shutdown()

    return answers
