"""The scheduler under random load: what it says that the cache holds is there, every request ends, and nothing is shared by mistake.

The cache is played by a table of what each place of each block holds: everything up to that token, tenant and adapter included.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest

from benchmarks.harness import write_result
from llavakit.engine.blocks import Span, block_key, root_key
from llavakit.engine.scheduler import Job, Limits, Row, Scheduler, Work

SIZE = 4
WORDS = 3  # few different ids, so that prompts often begin alike
PATIENCE = 4000


def held(job: Job, row: Row, position: int, before: int) -> int:
    """Name what a place holds: the token or the picture's feature, after everything before it."""
    span = next((span for span in job.spans if span.start <= position < span.stop), None)
    element = row.ids[position] if span is None else (span.digest, position - span.start + span.offset)
    return hash((before, element))


def chain(job: Job, row: Row, stop: int) -> list[int]:
    found, before = [], hash((job.tenant, job.adapter))
    for position in range(stop):
        before = held(job, row, position, before)
        found.append(before)
    return found


@dataclass
class Load:
    """Requests that come, grow, split, are aborted and end, over a cache that is too small for them."""

    seed: int
    limits: Limits
    steps: int = 0
    num_ended: int = 0
    num_aborted: int = 0
    num_tokens: int = 0
    longest_wait: int = 0
    live: dict[int, Job] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.scheduler = Scheduler(self.limits)
        self.memory = [[0] * SIZE for _ in range(self.limits.num_blocks)]
        self.number = 0

    def arrive(self) -> None:
        draw = self.draw
        ids = [draw.randrange(WORDS) for _ in range(draw.choice((1, 2, 7, 8, 9, 20, 40)))]
        spans: tuple[Span, ...] = ()
        if len(ids) > 8 and draw.random() < 0.5:
            start = draw.randrange(3)
            spans = (Span(start, start + 5, draw.choice("ab")),)
            ids[start : start + 5] = [0] * 5
        most_rows, num_new = draw.choice((1, 1, 1, 3)), draw.choice((1, 2, 5, 12, 30))
        if self.scheduler.blocks_needed(len(ids), num_new, most_rows) > self.limits.num_blocks:
            return
        job = Job(self.number, [Row(ids)], most_rows=most_rows, spans=spans, tenant=draw.choice("xy"), adapter=draw.choice(("", "l")))
        job.is_cached = draw.random() < 0.9
        self.live[job.number], self.left[job.number], self.arrived[job.number] = job, num_new, self.steps
        self.number += 1
        self.scheduler.add(job)

    def step(self) -> None:
        self.steps += 1
        works = self.scheduler.step()
        self.scheduler.check_integrity()
        assert sum(work.stop - work.first for work in works) <= max(self.limits.step_tokens, len(works) * 4)
        for work in works:
            self.check(work)
        for work in works:
            self.write(work)
        for work in works:
            if work.job.number in self.live:
                self.advance(work)
        if self.live and self.draw.random() < 0.03:
            self.end(self.draw.choice(list(self.live.values())), is_failed=self.draw.random() < 0.5)
            self.num_aborted += 1
        self.scheduler.check_integrity()
        assert works or not self.live, "there is work and nothing is planned"

    def check(self, work: Work) -> None:
        """Check that the cache holds all that stands before a work's first token."""
        job, row, first, stop = work
        assert first == row.num_computed < len(row.ids)
        assert stop <= len(row.ids) + len(row.draft)
        assert len(row.blocks) * SIZE >= stop
        found = [self.memory[row.blocks[position // SIZE]][position % SIZE] for position in range(first)]
        assert found == chain(job, row, first)

    def write(self, work: Work) -> None:
        job, row, first, stop = work
        before = self.memory[row.blocks[(first - 1) // SIZE]][(first - 1) % SIZE] if first else hash((job.tenant, job.adapter))
        for position in range(first, stop):
            # A wrong guess leaves something that stands for nothing.
            before = held(job, row, position, before) if position < len(row.ids) else -1
            self.memory[row.blocks[position // SIZE]][position % SIZE] = before

    def advance(self, work: Work) -> None:
        job, row, _, stop = work
        self.scheduler.computed(row, job, min(stop, len(row.ids)))
        if stop < len(row.ids):
            return
        if len(job.rows) < job.most_rows:
            self.copy(self.scheduler.regroup(job, [0] * job.most_rows))
        elif job.most_rows > 1 and all(other.num_computed == len(other.ids) for other in job.rows) and self.draw.random() < 0.5:
            self.copy(self.scheduler.regroup(job, [self.draw.randrange(len(job.rows)) for _ in job.rows]))
        elif job.most_rows > 1 and any(other.num_computed < len(other.ids) for other in job.rows):
            return
        for other in job.rows:
            if other.num_computed >= len(other.ids) - 1:
                other.ids.append(self.draw.randrange(WORDS))
                other.draft = [self.draw.randrange(WORDS) for _ in range(self.draw.choice((0, 0, 3)))]
                self.num_tokens += 1
        if job.most_rows > 1 and self.draw.random() < 0.05:
            self.scheduler.drop_row(job, self.draw.choice(job.rows))
        self.left[job.number] -= 1
        if self.left[job.number] <= 0:
            self.longest_wait = max(self.longest_wait, self.steps - self.arrived[job.number])
            self.end(job)
            self.num_ended += 1

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.memory[target] = self.memory[source][:]

    def end(self, job: Job, *, is_failed: bool = False) -> None:
        self.scheduler.end(job, is_failed=is_failed)
        for table in (self.live, self.left, self.arrived):
            table.pop(job.number)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if len(self.live) < 30 and self.draw.random() < 0.6:
                self.arrive()
            self.step()
        patience = PATIENCE
        while self.live:
            self.step()
            patience -= 1
            assert patience, "a request never ends"
        assert self.scheduler.pool.num_used == 0, "blocks leaked"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


def limits(seed: int) -> Limits:
    draw = random.Random(seed)
    return Limits(
        num_blocks=draw.choice((24, 40, 200)),
        block_tokens=SIZE,
        max_rows=draw.choice((3, 6, 16)),
        step_tokens=draw.choice((1, 8, 50)),
        has_prefix_cache=draw.random() < 0.8,
    )


@pytest.mark.catalogue("E12", "E13")
@pytest.mark.parametrize("seed", range(8))
def test_random_load(seed: int) -> None:
    load = Load(seed, limits(seed))
    load.run(250)
    assert load.num_ended > 5


@pytest.mark.soak
def test_100_000_steps() -> None:
    start, seed = time.perf_counter(), 0
    totals = {"steps": 0, "num_ended": 0, "num_aborted": 0, "num_tokens": 0, "num_preempted": 0, "num_found_tokens": 0}
    longest = 0
    while totals["steps"] < 100_000:
        load = Load(seed, limits(seed))
        load.run(5000)
        for name in ("steps", "num_ended", "num_aborted", "num_tokens"):
            totals[name] += getattr(load, name)
        totals["num_preempted"] += load.scheduler.num_preempted
        totals["num_found_tokens"] += load.scheduler.num_found_tokens
        longest, seed = max(longest, load.longest_wait), seed + 1
    seconds = round(time.perf_counter() - start, 1)
    write_result("scheduler_load", "make soak", {"seconds": seconds, "loads": seed, "longest_request_in_steps": longest, **totals})
    assert totals["num_preempted"] > 100
    assert totals["num_found_tokens"] > 1000


@pytest.mark.catalogue("E10")
def test_the_oldest_request_always_moves_on() -> None:
    scheduler = Scheduler(Limits(num_blocks=6, block_tokens=SIZE, max_rows=8, step_tokens=64, has_prefix_cache=False))
    jobs = [Job(number, [Row([number] * 7)]) for number in range(4)]
    for job in jobs:
        scheduler.add(job)
    finished: list[int] = []
    while len(finished) < 4:
        before = {id(job): len(job.rows[0].ids) for job in jobs}
        for work in scheduler.step():
            scheduler.computed(work.row, work.job, work.stop)
            work.row.ids.append(9)
        oldest = jobs[len(finished)]
        assert len(oldest.rows[0].ids) > before[id(oldest)]
        if len(oldest.rows[0].ids) >= 6 * SIZE:
            scheduler.end(oldest)
            finished.append(oldest.number)
    assert finished == [0, 1, 2, 3]


@pytest.mark.parametrize("is_cached", [True, False])
def test_rows_that_share_a_prompt_share_it_again_when_they_come_back(is_cached: bool) -> None:
    scheduler = Scheduler(Limits(num_blocks=14, block_tokens=SIZE, max_rows=8, step_tokens=64))
    job = Job(0, [Row([1] * 40)], most_rows=3, is_cached=is_cached)  # 10 blocks, and one more for each row
    scheduler.add(job)
    for step in range(6):
        for work in scheduler.step():
            scheduler.computed(work.row, job, work.stop)
        scheduler.check_integrity()
        if step == 0:
            scheduler.regroup(job, [0, 0, 0])
        if all(row.num_computed == len(row.ids) for row in job.rows):
            for number, row in enumerate(job.rows):
                row.ids.append(number)
        if step == 2:
            scheduler._preempt(job)
            scheduler.pool.check_integrity([])
            for block in range(14):  # others need the memory meanwhile
                scheduler.pool.forget(block)
    assert all(len(row.ids) > 42 for row in job.rows)
    assert len({row.blocks[0] for row in job.rows}) == 1
    assert scheduler.num_preempted == 1


@pytest.mark.catalogue("E23")
def test_tenants_take_turns() -> None:
    scheduler = Scheduler(Limits(num_blocks=64, block_tokens=SIZE, max_rows=1, step_tokens=64))
    order = [("busy", number) for number in range(6)] + [("quiet", 6)]
    jobs = {number: Job(number, [Row([number])], tenant=tenant) for tenant, number in order}
    for job in jobs.values():
        scheduler.add(job)
    started = []
    while scheduler.num_waiting or scheduler.num_running:
        for work in scheduler.step():
            started.append(work.job.number)
            scheduler.end(work.job)
    assert started.index(6) == 1
    assert [number for number in started if number < 6] == list(range(6))


def test_a_long_prompt_comes_in_chunks_between_which_others_go_on() -> None:
    scheduler = Scheduler(Limits(num_blocks=64, block_tokens=SIZE, max_rows=4, step_tokens=10))
    short, long = Job(0, [Row([1])]), Job(1, [Row([2] * 30)])
    scheduler.add(short)
    scheduler.add(long)
    lengths = []
    for _ in range(4):
        works = scheduler.step()
        assert works[0].job is short
        lengths.append([work.stop - work.first for work in works])
        for work in works:
            scheduler.computed(work.row, work.job, work.stop)
            if work.row.num_computed == len(work.row.ids):
                work.row.ids.append(3)
    assert lengths == [[1, 9], [1, 9], [1, 9], [1, 3]]


@pytest.mark.catalogue("G3")
def test_keys_differ_wherever_what_stands_there_does() -> None:
    ids, spans = [0] * SIZE, (Span(1, 3, "a"),)
    key = block_key(root_key("", ""), ids, 0, spans)
    others = [
        block_key(root_key("", "x"), ids, 0, spans),
        block_key(root_key("x", ""), ids, 0, spans),
        block_key(root_key("", ""), [0, 0, 0, 1], 0, spans),
        block_key(root_key("", ""), ids, 0, ()),
        block_key(root_key("", ""), ids, 0, (Span(1, 3, "b"),)),
        block_key(root_key("", ""), ids, 0, (Span(1, 3, "a", 1),)),
        block_key(root_key("", ""), ids, 0, (Span(0, 3, "a"),)),
        block_key(key, ids, 0, spans),
    ]
    assert len({key, *others}) == 1 + len(others)
    assert key == block_key(root_key("", ""), ids, 0, (*spans, Span(9, 12, "c")))
