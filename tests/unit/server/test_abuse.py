"""Many bad requests, drawn: no 5xx, nothing left behind, a good request beside them unharmed. Seconds here, half an hour in the soak."""

import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.harness import write_result
from llavakit import LLM
from llavakit.engine.pictures import FeatureCache
from llavakit.server.config import ServerConfig
from llavakit.server.openapi import document
from tests.serving import MODEL, Running, Server, apart, chat_body, data_url, picture, running
from tests.serving_abuse import ACTS, Counts, abuse

SCHEMA = schemathesis.openapi.from_dict(document())
FOUND: Any = [found.ok() for found in SCHEMA.get_all_operations()]  # type: ignore[union-attr]
OPERATIONS = {operation.path: operation for operation in FOUND if operation.method == "post"}
CONFIG = ServerConfig(port=0, max_new_tokens=8, default_new_tokens=4, header_s=1.0, body_s=1.0)


def check_described(server: Running, path: str, body: Any, is_known: bool) -> None:
    """Send a body made from the description, and check that the answer is one that it names."""
    if isinstance(body, dict) and is_known and "model" in body:
        body = {**body, "model": MODEL}
    reply = server.ask("POST", path, body)
    described = document()["paths"][path]["post"]["responses"]
    assert str(reply.status) in described, (reply.status, reply.body, body)
    assert reply.status < 500, (reply.status, reply.body, body)
    if reply.status != 200:
        assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def drawn(path: str, count: int) -> Any:
    """Make the property test of a path."""
    modes = [OPERATIONS[path].as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(modes), st.booleans())
    def check(server: Running, case: Any, is_known: bool) -> None:
        check_described(server, path, case.body, is_known)

    return check


@pytest.mark.catalogue("C4", "C5", "C7", "A27")
@pytest.mark.parametrize("path", OPERATIONS)
def test_bodies_drawn_from_the_description_get_described_answers(path: str) -> None:
    with running(CONFIG) as server:
        drawn(path, 25)(server)
        assert server.is_quiet()


def checked(counts: Counts, server: Server) -> None:
    assert counts.wrong == []
    assert counts.good > 0
    assert not [status for status in counts.statuses if status >= 500 and status != 503], counts.statuses
    assert server.ask("GET", "/health").status == 200


@pytest.mark.catalogue("E1", "E5", "E6", "F8", "A1", "C1")
def test_a_good_client_is_unharmed_by_bad_ones() -> None:
    with running(CONFIG) as server:
        checked(abuse(server, 8.0, seed=1), server)
        assert server.is_quiet()


@pytest.mark.catalogue("E22")
def test_what_a_request_held_is_free_when_it_ends() -> None:
    """A body of 32 MB that waits in a cycle for the collector, which counts objects and not bytes, is a leak to whoever sends many."""

    def asked(**fields: Any) -> Callable[[Server, random.Random], object]:
        return lambda server, _: server.chat(chat_body("What?", data_url(picture()), **fields))

    def scored(server: Server, _: random.Random) -> object:
        return server.ask("POST", "/v1/score", {**chat_body(), "candidates": ["yes", "no"]})

    def ours(found: object) -> str:
        if isinstance(found, FrameType):
            return found.f_code.co_qualname if "llavakit" in found.f_code.co_filename else ""
        return type(found).__qualname__ if type(found).__module__.startswith(("llavakit", "h11")) or isinstance(found, Tensor) else ""

    slow = {"max_tokens": 700, "logit_bias": {"2": -100}}
    acts = (asked(), asked(stream=True), asked(n=2), asked(temperature=9), asked(**slow), asked(**slow, stream=True), scored, *ACTS)
    with running(replace(CONFIG, max_new_tokens=700, request_s=0.1)) as server:
        for number, act in enumerate(acts):
            act(server, random.Random(number))  # what comes with the first one stays
        assert server.is_quiet()
        gc.collect()
        gc.freeze()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for number, act in enumerate(acts):
                rng = random.Random(number)
                for _ in range(3):
                    act(server, rng)
                assert server.is_quiet()
                gc.collect()
                left = Counter(filter(None, map(ours, gc.garbage)))
                assert not left, (number, left)
                gc.garbage.clear()
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
            gc.unfreeze()


def small_llm() -> LLM:
    """The miniature; what fills up by design is small, and the pages of its cache are there from the start."""
    llm = LLM(max_batch=8, kv_memory=64 << 20, device="cpu", dtype="float32")
    llm.engine.features = FeatureCache(16 << 20)
    pages = llm.engine.runner.pages
    for memory in (*pages.keys, *pages.values):
        memory.zero_()
    return llm


@pytest.mark.soak
@pytest.mark.catalogue("E22")
def test_half_an_hour_of_bad_clients() -> None:
    with apart(CONFIG, small_llm) as (server, process):
        abuse(server, 120.0, seed=2)
        counts = abuse(server, 1680.0, seed=3, process=process)
        checked(counts, server)
        time.sleep(2.0)
        left = server.counts()
        assert left["llava_requests_running"] == left["llava_requests_waiting"] == left["llava_cache_blocks_used"] == 0
        part = len(counts.rss_bytes) // 10
        megabytes = [round(statistics.median(counts.rss_bytes[n * part :][:part]) / 1e6, 1) for n in range(10)]
        facts = {"good": counts.good, "busy": counts.busy, "slowest_s": round(counts.slowest_s, 2), "rss_mb": megabytes}
        write_result("serving_abuse", "make soak", {"seconds": 1800, **facts, "acts": dict(counts.acts), "statuses": dict(counts.statuses)})
        assert megabytes[-1] - megabytes[0] < 16


@pytest.mark.soak
def test_ten_thousand_bodies_from_the_description() -> None:
    with running(CONFIG) as server:
        for path in OPERATIONS:
            drawn(path, 2500)(server)
        assert server.is_quiet()
        write_result("serving_bodies", "make soak", {"bodies": 2500 * len(OPERATIONS)})
