"""A real Ray of this machine, where it is installed: two replicas, one of which is killed under load, and rows answered on Ray Data.

Ray listens on all addresses of the machine while this runs.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.harness import write_result
from llavakit.engine.bulk import answer_all, open_questions
from llavakit.engine.llm import LLM
from llavakit.server.cluster import start_cluster
from llavakit.server.cluster_bulk import cluster_answers
from llavakit.server.config import ClusterConfig, ServerConfig
from llavakit.types import SamplingParams
from tests.serving import Reply, Running, chat_body, data_url, picture, running
from tests.unit.engine.test_bulk import write

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
ray: Any = pytest.importorskip("ray")
SMALL = functools.partial(LLM, max_batch=4, kv_memory=32 << 20, device="cpu", dtype="float32")


@pytest.fixture
def server() -> Iterator[Running]:
    config = ServerConfig(port=0, max_waiting=512)
    backend = start_cluster(SMALL, config, ClusterConfig(cluster=True, replicas=2, replica_cpus=0.5))
    with running(config, backend=backend) as found:
        yield found


def replicas() -> list[int]:
    return [process.pid for process in psutil.process_iter(["cmdline"]) if "ray::ServeReplica" in " ".join(process.info["cmdline"] or ())]


def test_a_replica_killed_under_load_loses_nothing_that_had_not_begun(server: Running) -> None:
    whole = server.chat(chat_body("How many things are there?", data_url(picture()), max_tokens=30))
    assert whole.status == 200
    text = whole.json()["choices"][0]["message"]["content"]
    counts = server.counts()
    assert counts["llava_answer_tokens"] >= whole.json()["usage"]["completion_tokens"]
    assert counts["llava_cache_blocks"] == 2 * SMALL().engine.settings.num_blocks, "of both replicas"

    def ask(number: int) -> Reply:
        return server.chat(chat_body("How many things are there?", data_url(picture(number % 8)), max_tokens=30, stream=number % 2 == 0))

    killed: list[int] = []

    def kill() -> None:
        time.sleep(1.5)
        killed.append(replicas()[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(ask, range(400)))
    killer.join()
    assert killed
    ended = [reply for reply in replies if reply.status == 200 and reply.headers["content-type"] == "text/event-stream"]
    broken = [reply for reply in ended if reply.events()[-1] is not None]
    refused = [reply for reply in replies if reply.status != 200]
    assert {reply.status for reply in refused} <= {503}
    for reply in broken:
        assert reply.events()[-1]["error"]["code"] == "replica_lost"
    again = server.chat(chat_body("How many things are there?", data_url(picture()), max_tokens=30))
    assert again.json()["choices"][0]["message"]["content"] == text
    deadline = time.monotonic() + 60
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(replicas()) == 2, "the replica was not replaced"
    facts = {"requests": len(replies), "ended_by_the_kill": len(broken) + len(refused), "whole": len(replies) - len(broken) - len(refused)}
    assert facts["ended_by_the_kill"] <= 12
    write_result("serving_ray", "make soak", facts)


def test_rows_are_answered_on_ray_data(tmp_path: Path) -> None:
    rows = [{"id": str(n), "question": "How many things are there?", "image": f"{n % 3}.png"} for n in range(90)]
    questions = open_questions(write(tmp_path, rows))
    answers = cluster_answers(SMALL, questions, SamplingParams(max_tokens=6), ClusterConfig(cluster=True, replicas=2, replica_cpus=0.5))
    assert answer_all(answers, questions, tmp_path / "out.jsonl", {}) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
