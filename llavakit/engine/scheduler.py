"""Which tokens are computed next: continuous batching, chunked prefill, admission, preemption, and the prefix cache.

Owns: Scheduler, Job and Row, the scheduler's view of a request and its sequences. Refuses: torch, sampling, text.
Invariants: a live job is either running or waiting; only running jobs hold blocks; running jobs are in order of arrival, and where
memory is short the youngest goes back to wait (what it has computed is computed again, or found again), so the oldest always moves on.
Fairness: tenants take turns at the door; who was running before comes first.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llavakit.engine.blocks import BlockPool, Span, block_key, root_key

__all__ = ["Job", "Limits", "Row", "Scheduler", "Work"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much runs at once."""

    num_blocks: int
    """Blocks of the cache."""
    block_tokens: int
    """Tokens of a block."""
    max_rows: int
    """Sequences that run together."""
    step_tokens: int
    """Tokens of a step; those of prompts beyond it wait for the next one."""
    has_prefix_cache: bool = True
    """Whether full blocks are found again by their text."""


@dataclass(slots=True, eq=False)
class Row:
    """One sequence: its ids, and how far the cache holds it."""

    ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they are known."""
    num_keyed: int = 0
    """Blocks whose keys the pool has been told, or that it gave."""
    num_found: int = 0
    """Blocks that the pool gave."""
    draft: Sequence[int] = ()
    """Guesses of what follows, to be computed along with the last id."""


@dataclass(slots=True, eq=False)
class Job:
    """A request: its sequences, all of which begin with the same prompt."""

    number: int
    """Of arrival."""
    rows: list[Row]
    most_rows: int = 1
    """Sequences that it may have at once."""
    spans: tuple[Span, ...] = ()
    tenant: str = ""
    adapter: str = ""
    is_cached: bool = True
    """Whether its blocks may be shared with other jobs."""
    most_found: int | None = None
    """Ids that need not be computed where the cache holds them; None for all but the last one, whose logits are wanted."""
    is_running: bool = False
    num_prompt: int = field(init=False)
    """Ids that all its rows begin with."""

    def __post_init__(self) -> None:
        self.num_prompt = len(self.rows[0].ids)


class Work(NamedTuple):
    """Tokens first to stop - 1 of a row, drafts included, to be computed in a step."""

    job: Job
    row: Row
    first: int
    stop: int


class Scheduler:
    """The queue, the running jobs, and their blocks."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.pool = limits, BlockPool(limits.num_blocks)
        self.num_preempted = self.num_found_tokens = self.num_sought_tokens = 0
        self._running: list[Job] = []
        self._returning: list[Job] = []
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._pending: dict[bytes, Job] = {}
        self._num_rows = 0

    @property
    def num_running(self) -> int:
        """Jobs that hold memory."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for their first step, or to come back."""
        return len(self._returning) + sum(map(len, self._queues.values()))

    def blocks_needed(self, num_prompt: int, num_new: int, num_rows: int) -> int:
        """Return the blocks that a request holds at most, with prompt blocks shared by its rows."""
        size = self.limits.block_tokens
        shared = num_prompt // size
        return shared + num_rows * (-(-(num_prompt + num_new) // size) - shared)

    def add(self, job: Job) -> None:
        """Let a job wait for its turn."""
        queue = self._queues.get(job.tenant)
        if queue is None:
            queue = self._queues[job.tenant] = deque()
        queue.append(job)

    def step(self) -> list[Work]:
        """Choose the next step's work: a token of every running sequence, then prompts as far as they fit."""
        works: list[Work] = []
        unfinished: list[Job] = []
        budget = self.limits.step_tokens
        for job in tuple(self._running):
            is_unfinished = False
            self._share(job)
            for row in job.rows:
                missing = len(row.ids) - row.num_computed
                if missing == 1 and job.is_running:
                    budget -= self._place(works, job, row, 1 + len(row.draft))
                elif missing > 1:
                    is_unfinished = True
            if is_unfinished:
                unfinished.append(job)
        for job in unfinished:
            budget -= self._chunk(works, job, budget)
        self._admit(works, budget)
        return works

    def computed(self, row: Row, job: Job, num_computed: int) -> None:
        """Note that the cache now holds so many of a row's ids; blocks that became full can be found from now on."""
        row.num_computed = num_computed
        num_full = num_computed // self.limits.block_tokens
        if num_full > row.num_keyed and job.is_cached and self.limits.has_prefix_cache:
            self._extend_keys(job, row, num_full)
            for index in range(row.num_keyed, num_full):
                self.pool.commit(row.blocks[index], row.keys[index])
                if self._pending.get(row.keys[index]) is job:
                    del self._pending[row.keys[index]]
            row.num_keyed = num_full

    def regroup(self, job: Job, parents: Sequence[int]) -> list[tuple[int, int]]:
        """Let the job's rows be continuations of these of its present ones, all of whose ids are computed; others are let go.

        A row's first continuation is the row itself. Further ones share its full blocks; returns the pairs (from, to) of blocks to copy
        before the next step. Where no block is left for the last, partly filled one, its tokens are computed again.
        """
        rows: list[Row] = []
        copies: list[tuple[int, int]] = []
        kept: set[int] = set()
        for parent in parents:
            row = job.rows[parent]
            if parent in kept:
                row = self._copy(row, copies)
            kept.add(parent)
            rows.append(row)
        for index, row in enumerate(job.rows):
            if index not in kept:
                self._release(row)
        job.rows = rows
        return copies

    def drop_row(self, job: Job, row: Row) -> None:
        """Let a row go that is done; the job goes on with its others."""
        self._release(row)
        job.rows.remove(row)
        job.most_rows -= 1
        self._num_rows -= 1

    def end(self, job: Job, *, is_failed: bool = False) -> None:
        """Let a job go, wherever it is; what a failed one computed is not found again."""
        if job.is_running:
            for row in job.rows:
                if is_failed:
                    for block in row.blocks[row.num_found : row.num_keyed]:
                        self.pool.forget(block)
                self._release(row)
            self._leave(job)
        elif job in self._returning:
            self._returning.remove(job)
        else:
            queue = self._queues[job.tenant]
            queue.remove(job)
            if not queue:
                del self._queues[job.tenant]

    def check_integrity(self) -> None:
        """Check the invariants of jobs, rows and blocks. Raises: AssertionError."""
        waiting = [*self._returning, *(job for queue in self._queues.values() for job in queue)]
        everyone = [*self._running, *waiting]
        assert len({id(job) for job in everyone}) == len(everyone), "a job is in two places"
        assert all(job.is_running for job in self._running)
        assert not any(job.is_running for job in waiting)
        assert [job.number for job in self._running] == sorted(job.number for job in self._running), "running jobs are out of order"
        assert not any(row.blocks or row.num_computed for job in waiting for row in job.rows), "a waiting job holds blocks"
        assert self._num_rows == sum(job.most_rows for job in self._running)
        assert all(len(job.rows) <= job.most_rows for job in everyone), "a job has more rows than it may have"
        assert all(job.is_running for job in self._pending.values()), "a key is pending for a job that does not run"
        assert all(self._queues.values()), "an empty queue was kept"
        self.pool.check_integrity(row.blocks for job in self._running for row in job.rows)
        for row in (row for job in self._running for row in job.rows):
            assert len(row.blocks) * self.limits.block_tokens >= row.num_computed, "a row's blocks do not hold what it computed"

    def _copy(self, row: Row, copies: list[tuple[int, int]]) -> Row:
        size = self.limits.block_tokens
        num_full = row.num_computed // size
        copy = Row(list(row.ids), num_full * size, row.blocks[:num_full], row.keys[:], min(row.num_keyed, num_full), row.num_found)
        for block in copy.blocks:
            self.pool.hold(block)
        if num_full * size < row.num_computed and (own := self.pool.allocate()) is not None:
            copies.append((row.blocks[num_full], own))
            copy.blocks.append(own)
            copy.num_computed = row.num_computed
        return copy

    def _place(self, works: list[Work], job: Job, row: Row, count: int) -> int:
        """Plan a row's next tokens if there are blocks for them; returns how many were planned."""
        first = row.num_computed
        missing = -(-(first + count) // self.limits.block_tokens) - len(row.blocks)
        if missing > 0 and not self._grow(works, job, row, missing):
            return 0
        works.append(Work(job, row, first, first + count))
        return count

    def _grow(self, works: list[Work], job: Job, row: Row, count: int) -> bool:
        """Give a row more blocks, taking them from the youngest jobs; False when this job itself had to go."""
        for _ in range(count):
            block = self.pool.allocate()
            while block is None:
                victim = self._running[-1]
                self._preempt(victim)
                works[:] = [work for work in works if work.job is not victim]
                if victim is job:
                    return False
                block = self.pool.allocate()
            row.blocks.append(block)
        return True

    def _chunk(self, works: list[Work], job: Job, budget: int) -> int:
        """Plan as much of a job's uncomputed ids as the budget allows; returns how many were planned."""
        planned = 0
        for row in job.rows:
            missing = len(row.ids) - row.num_computed
            count = min(missing, budget - planned)
            if missing > 1 and count > 0 and job.is_running and not self._waits(job, row):
                planned += self._place(works, job, row, count)
        return planned

    def _admit(self, works: list[Work], budget: int) -> None:
        """Start waiting jobs while there is room for them."""
        held: list[Job] = []
        while budget > 0 and len(held) <= self.limits.max_rows and (job := self._next_waiting()) is not None:
            is_crowded = self._running and self._num_rows + job.most_rows > self.limits.max_rows
            state = "full" if is_crowded else self._start(job)
            if state == "started":
                budget -= self._chunk_or_place(works, job, budget)
            else:
                held.append(job)
            if state == "full":
                break
        for job in held:
            bisect.insort(self._returning, job, key=_number)

    def _num_shared(self, job: Job) -> int:
        """Return how many blocks all rows of a job can have in common."""
        return job.num_prompt // self.limits.block_tokens if len(job.rows) > 1 else 0

    def _waits(self, job: Job, row: Row) -> bool:
        """Whether a row of a job that came back waits for the first one to compute the blocks that they share."""
        return row is not job.rows[0] and not row.blocks and self._num_shared(job) > 0

    def _share(self, job: Job) -> None:
        """Give rows that waited the blocks of the prompt, once the first row has computed them."""
        first, *others = job.rows
        num_shared = self._num_shared(job)
        if others and first.num_computed >= num_shared * self.limits.block_tokens:
            for row in others:
                if self._waits(job, row):
                    row.blocks = first.blocks[:num_shared]
                    row.num_computed = num_shared * self.limits.block_tokens
                    row.num_keyed, row.num_found = min(first.num_keyed, num_shared), min(first.num_found, num_shared)
                    for block in row.blocks:
                        self.pool.hold(block)

    def _chunk_or_place(self, works: list[Work], job: Job, budget: int) -> int:
        """Plan a started job's first work; a prompt of one token has no chunk to wait for."""
        planned = self._chunk(works, job, budget)
        for row in job.rows:
            if len(row.ids) - row.num_computed == 1 and job.is_running:
                planned += self._place(works, job, row, 1)
        return planned

    def _next_waiting(self) -> Job | None:
        """Take the next job from the door: who ran before, then tenants in turn."""
        if self._returning:
            return self._returning.pop(0)
        if not self._queues:
            return None
        tenant, queue = next(iter(self._queues.items()))
        job = queue.popleft()
        if queue:
            self._queues.move_to_end(tenant)
        else:
            del self._queues[tenant]
        return job

    def _start(self, job: Job) -> Literal["started", "held", "full"]:
        """Let a job run if the blocks that it needs are there, beginning with those that hold its text already.

        A job whose next block another one is computing just now is held until that can be found.
        """
        size, is_cached = self.limits.block_tokens, job.is_cached and self.limits.has_prefix_cache
        num_shared = self._num_shared(job)
        alone = job.rows[:1] if num_shared else job.rows
        if is_cached:
            for row in alone:
                self._extend_keys(job, row, self._most_found(job, row))
                unknown = next((key for key in row.keys[: self._most_found(job, row)] if key not in self.pool), None)
                if unknown is not None and self._pending.get(unknown, job) is not job:
                    return "held"
        needed = sum(-(-len(row.ids) // size) - num_shared for row in job.rows) + num_shared
        for row in alone:
            for key in row.keys[: self._most_found(job, row)] if is_cached else ():
                if (block := self.pool.find(key)) is None:
                    break
                row.blocks.append(block)
            row.num_keyed = row.num_found = len(row.blocks)
            row.num_computed = len(row.blocks) * size
            needed -= len(row.blocks)
        if needed + len(self._running) > self.pool.num_available and (self._running or needed > self.pool.num_available):
            for row in job.rows:
                self._release(row)
            return "full"
        job.is_running = True
        bisect.insort(self._running, job, key=_number)
        self._num_rows += job.most_rows
        for row in job.rows:
            self.num_found_tokens += row.num_computed
            self.num_sought_tokens += len(row.ids)
            for key in row.keys[row.num_keyed :]:
                self._pending.setdefault(key, job)
        return "started"

    def _most_found(self, job: Job, row: Row) -> int:
        """Return how many blocks of a row may come from the cache."""
        most = len(row.ids) - 1 if job.most_found is None else min(job.most_found, len(row.ids) - 1)
        return most // self.limits.block_tokens

    def _preempt(self, job: Job) -> None:
        """Send a running job back to wait."""
        for row in job.rows:
            self._release(row)
        self._leave(job)
        self.num_preempted += 1
        bisect.insort(self._returning, job, key=_number)

    def _leave(self, job: Job) -> None:
        """Take a job off the running ones."""
        del self._running[bisect.bisect_left(self._running, job.number, key=_number)]
        job.is_running = False
        self._num_rows -= job.most_rows
        for row in job.rows:
            for key in row.keys:
                if self._pending.get(key) is job:
                    del self._pending[key]

    def _release(self, row: Row) -> None:
        """Give a row's blocks back, its last ones first, so that beginnings, which come again, stay longest."""
        for block in reversed(row.blocks):
            self.pool.release(block)
        row.blocks = []
        row.num_computed = row.num_keyed = row.num_found = 0
        row.draft = ()

    def _extend_keys(self, job: Job, row: Row, count: int) -> None:
        """Know the keys of a row's first count blocks."""
        size = self.limits.block_tokens
        for index in range(len(row.keys), count):
            before = row.keys[-1] if row.keys else root_key(job.adapter, job.tenant)
            first = index * size
            row.keys.append(block_key(before, row.ids[first : first + size], first, job.spans))


def _number(job: Job) -> int:
    return job.number
