"""The engine: requests go in, a step at a time tokens come out. The only generation loop of the project.

Owns: Engine and EngineSettings. A step plans (scheduler), encodes pictures, runs the model once (runner), and lets every answer that
got logits take its next token (request). Not thread-safe: one thread steps; service lets others talk to it.
Invariants: an accepted request ends in tokens, an error or an abort; what fails is the request, never its company; greedy answers on a
CPU do not depend on company, batch size, chunking, caching or preemption.
Legend: T tokens of a step  M rows whose logits are wanted  V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from llavakit.checkpoint.factors import load_lora
from llavakit.engine.lookup import Lookup
from llavakit.engine.pictures import FeatureCache, Picture, pictures_of, spans_of
from llavakit.engine.request import Answer, Request, TokenEvent
from llavakit.engine.runner import Runner, StepInput, page_shape
from llavakit.engine.scheduler import Job, Limits, Row, Scheduler, Work
from llavakit.errors import CapacityError, ConfigError, NumericError, PromptError
from llavakit.model.llava import IMAGE_PLACEHOLDER, LlamaCore, LlavaCore
from llavakit.model.lora import Lora
from llavakit.model.surgery import adapt
from llavakit.ops.pages import PAGE
from llavakit.ops.sampling import logprobs_of
from llavakit.types import Completion

__all__ = ["FEATURE_BYTES", "Engine", "EngineSettings", "Stats"]

FEATURE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How an engine runs."""

    num_blocks: int
    """Blocks of the cache, of 32 tokens each."""
    max_batch: int = 32
    """Sequences that run together."""
    step_tokens: int = 512
    """Tokens of a step; longer prompts come in chunks between which the others go on."""
    prefix_cache: bool = True
    """Whether what was computed once is found again."""
    feature_bytes: int = FEATURE_BYTES
    """Memory for features of pictures."""
    lookup_tokens: int = 0
    """Tokens that are guessed per step from what the prompt and answer held before, and verified; 0 is off. Answers do not change."""

    def __post_init__(self) -> None:
        for name, least in (("num_blocks", 1), ("max_batch", 1), ("step_tokens", 1), ("feature_bytes", 0), ("lookup_tokens", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What an engine has done and is doing."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_tokens: int
    """Tokens that answers were given."""
    num_preempted: int
    num_blocks: int
    num_used_blocks: int
    num_found_tokens: int
    """Prompt tokens that the cache held."""
    num_sought_tokens: int
    """Prompt tokens of all started requests."""
    num_encoded_pictures: int
    num_found_pictures: int
    num_guessed_tokens: int
    num_right_guesses: int


@dataclass(slots=True, eq=False)
class _Task:
    """A request in the engine: its job, and which row belongs to which answer."""

    request: Request
    job: Job
    pictures: dict[str, Picture]
    answers: list[Answer]
    lora: Lora | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    by_row: dict[Row, Answer] = field(default_factory=dict)
    logits: dict[Row, Tensor] = field(default_factory=dict)
    """Of a beam search's rows that wait for the others."""
    lookups: dict[Row, Lookup] = field(default_factory=dict)


class Engine:
    """Runs requests together."""

    def __init__(self, core: LlamaCore | LlavaCore, settings: EngineSettings) -> None:
        """Allocate the cache. Raises: CapacityError when there is no memory for it."""
        self.core, self.settings = core, settings
        try:
            self.runner = Runner(core, settings.num_blocks)
        except (RuntimeError, MemoryError) as error:
            weight = core.get_input_embeddings().weight
            size = settings.num_blocks * page_shape(core).page_bytes(weight.dtype, weight.device)
            raise CapacityError(f"no memory for a cache of {size} bytes; lower kv_memory or max_batch") from error
        limits = Limits(
            num_blocks=settings.num_blocks,
            block_tokens=PAGE,
            max_rows=settings.max_batch,
            step_tokens=settings.step_tokens,
            has_prefix_cache=settings.prefix_cache,
        )
        self.scheduler = Scheduler(limits)
        self.features = FeatureCache(settings.feature_bytes)
        self._tasks: dict[int, _Task] = {}
        self._adapters: dict[str, tuple[str, Lora]] = {}
        self._num_adapters = 0
        self._events: list[TokenEvent] = []
        self._num_added = self._num_steps = self._num_tokens = self._num_guessed = self._num_right = 0
        image_ids = (IMAGE_PLACEHOLDER, core.config.image_token_index) if isinstance(core, LlavaCore) else ()
        self._image_ids = frozenset(index for index in image_ids if index is not None)

    @property
    def has_work(self) -> bool:
        """Whether some request is not over, or its end was not told yet."""
        return bool(self._tasks or self._events)

    def add(self, request: Request) -> int:
        """Accept a request and return its number. Raises: PromptError, CapacityError for one that can never run."""
        prompt = request.prompt
        pictures = pictures_of(prompt)
        is_embedded = request.terms.embeds_TD is not None
        if pictures and not isinstance(self.core, LlavaCore):
            raise PromptError("this model is a language model without a vision tower; ask without a picture")
        spans = () if is_embedded else spans_of(prompt, pictures, self._image_ids)
        if not is_embedded:
            self._check_ids(prompt.ids)
        adapter, lora = self._adapter(request.terms.adapter)
        most_rows = request.params.num_beams if request.beams is not None else request.num_answers
        needed = self.scheduler.blocks_needed(len(prompt.ids), request.max_tokens, most_rows)
        if needed > self.settings.num_blocks:
            raise CapacityError(
                f"the request may fill {needed} blocks of {PAGE} tokens and the cache has {self.settings.num_blocks}; "
                "lower max_tokens or n, or raise kv_memory"
            )
        job = Job(
            self._num_added,
            [Row(list(prompt.ids))],
            most_rows=most_rows,
            spans=spans,
            tenant=request.terms.tenant,
            adapter=adapter,
            is_cached=not is_embedded,
            most_found=None if request.logprobs_from is None else request.logprobs_from - 1,
        )
        answers = request.start_answers()
        task = _Task(request, job, {picture.digest: picture for picture in pictures}, answers, lora)
        task.by_row[job.rows[0]] = answers[0]
        self._num_added += 1
        self._tasks[job.number] = task
        self.scheduler.add(job)
        return job.number

    def load_adapter(self, name: str, source: str | Path, *, revision: str | None = None, allow_pickle: bool = False) -> None:
        """Load a PEFT adapter under a name; requests that name it go through it. Raises: ConfigError, CheckpointError."""
        if not name or name in self._adapters:
            raise ConfigError(f"an adapter needs a name of its own, got {name!r}; {self._loaded}")
        if self.runner.adapting is None:
            self.runner.adapting = adapt(self.core)
        lora = load_lora(source, self.core, revision=revision, allow_pickle=allow_pickle)
        # A name that comes back may mean other weights, so what was computed under it is not found again.
        self._num_adapters += 1
        self._adapters[name] = (f"{name} {self._num_adapters}", lora)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return tuple(self._adapters)

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; requests that go through it go on to their end. Raises: ConfigError for one that is not there."""
        if self._adapters.pop(name, None) is None:
            raise ConfigError(f"there is no adapter {name!r}; {self._loaded}")

    def abort(self, number: int) -> None:
        """End a request now; its last event, with what there is of the answer, comes with the next step."""
        task = self._tasks.get(number)
        if task is not None:
            self._end(task, task.answers[0].failed("abort", None))

    def is_queued(self, number: int) -> bool:
        """Tell whether a request holds no memory: it waits for its first step, or to come back."""
        task = self._tasks.get(number)
        return task is not None and not task.job.is_running

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Compute the next tokens of everything that runs; returns what that gave, request by request."""
        works = self.scheduler.step()
        inputs = self._inputs(works)
        if inputs:
            self._compute(inputs)
        events, self._events = self._events, []
        return events

    def run(self) -> Iterator[TokenEvent]:
        """Step until nothing is left to do."""
        while self.has_work:
            yield from self.step()

    def stats(self) -> Stats:
        """Count."""
        pool, scheduler = self.scheduler.pool, self.scheduler
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            num_preempted=scheduler.num_preempted,
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_found_tokens=scheduler.num_found_tokens,
            num_sought_tokens=scheduler.num_sought_tokens,
            num_encoded_pictures=self.features.num_encoded,
            num_found_pictures=self.features.num_found,
            num_guessed_tokens=self._num_guessed,
            num_right_guesses=self._num_right,
        )

    # What a step does

    def _compute(self, inputs: Sequence[StepInput]) -> None:
        """Run the model and let every request go on; where the model cannot run, the requests of this step end."""
        self._num_steps += 1
        works = [given.work for given in inputs]
        try:
            h_TD = self.runner.run(inputs)
        except Exception as error:
            for number in {work.job.number for work in works}:
                self._fail(self._tasks[number], error)
            return
        self._advance(works, h_TD)

    def _inputs(self, works: Sequence[Work]) -> list[StepInput]:
        """Gather what the works need beside their ids; a request whose picture cannot be encoded ends here."""
        inputs: list[StepInput] = []
        for work in works:
            task = self._tasks.get(work.job.number)
            if task is None:  # it failed with another of its rows
                continue
            try:
                features = self._features(task, work)
            except Exception as error:
                self._fail(task, error)
                inputs = [given for given in inputs if given.work.job is not work.job]
                continue
            inputs.append(StepInput(work, features, task.request.terms.embeds_TD, task.lora))
        return inputs

    def _features(self, task: _Task, work: Work) -> dict[str, Tensor]:
        needed = {span.digest for span in work.job.spans if span.start < work.stop and span.stop > work.first}
        for digest in needed - task.features.keys():
            encode = functools.partial(self.runner.encode, task.pictures[digest], task.lora)
            task.features[digest] = self.features.features((work.job.tenant, work.job.adapter, digest), encode)
        return task.features

    def _advance(self, works: Sequence[Work], h_TD: Tensor) -> None:
        """Let every request go on with what the step computed of it."""
        chosen: list[int] = []
        parts: list[tuple[int, int]] = []
        offset = 0
        for work in works:
            wanted = _wanted(work, self._tasks[work.job.number].request)
            parts.append((len(chosen), len(chosen) + len(wanted)))
            chosen += [offset + position - work.first for position in wanted]
            offset += work.stop - work.first
        logits_MV = self.runner.logits(h_TD, chosen) if chosen else h_TD.new_empty(0, 1)
        low_M, high_M = torch.aminmax(logits_MV, dim=-1)
        is_finite = torch.isfinite(low_M + high_M).tolist()  # waits for the device, as every step must
        greedy: dict[int, list[int]] = {}
        for work, (begin, end) in zip(works, parts, strict=True):
            task = self._tasks.get(work.job.number)
            if task is None:  # it failed with another of its rows
                continue
            request = task.request
            num_ids = logits_MV.shape[1] if request.num_ids is None else request.num_ids
            if request.is_greedy and num_ids not in greedy:
                greedy[num_ids] = logits_MV[:, :num_ids].argmax(-1).tolist()
            try:
                if not all(is_finite[begin:end]):
                    raise NumericError("the model's scores are not finite; its weights, or what it was asked, are out of range")
                self._take(task, work, logits_MV[begin:end, :num_ids], greedy[num_ids][begin:end] if request.is_greedy else None)
            except Exception as error:
                self._fail(task, error)

    def _take(self, task: _Task, work: Work, logits_MV: Tensor, likeliest: list[int] | None) -> None:
        """Let one request take what one of its rows got; likeliest are the best tokens where nothing else is asked for."""
        job, row, _, stop = work
        request = task.request
        if scored := _scored(work, request):
            num_top = 0 if request.params.prompt_logprobs is None else request.params.prompt_logprobs
            tokens = row.ids[scored.start + 1 : scored.stop + 1]
            request.prompt_logprobs += logprobs_of(logits_MV[: len(tokens)], tokens, num_top)
            logits_MV, likeliest = logits_MV[len(tokens) :], None if likeliest is None else likeliest[len(tokens) :]
        self.scheduler.computed(row, job, min(stop, len(row.ids)))
        if stop < len(row.ids):
            return
        task.features = {}
        if request.terms.scored_from is not None:
            self._end(task, request.scored())
        elif request.beams is not None:
            self._search(task, row, logits_MV[0])
        elif request.num_answers > 1 and not any(answer.ids for answer in task.answers):
            self.runner.copy_pages(self.scheduler.regroup(job, [0] * request.num_answers))
            task.by_row = dict(zip(job.rows, task.answers, strict=True))
            for answering in tuple(job.rows):
                self._extend(task, answering, logits_MV, likeliest)
        else:
            self._extend(task, row, logits_MV, likeliest)

    def _extend(self, task: _Task, row: Row, logits_MV: Tensor, likeliest: list[int] | None) -> None:
        """Let an answer take a token, and further ones as long as they are those that were guessed."""
        answer, draft, num_before = task.by_row[row], row.draft, len(row.ids)
        row.draft, num_right = (), 0
        for index, logits_V in enumerate(logits_MV):
            token = answer.choose(logits_V) if likeliest is None else likeliest[index]
            logprob = answer.report(logits_V, token)
            row.ids.append(token)
            self._num_tokens += 1
            text = answer.push(token)
            is_over = answer.finish_reason is not None
            is_last = is_over and all(other.finish_reason is not None for other in task.answers)
            completion = answer.completion() if is_over else None
            self._events.append(TokenEvent(task.job.number, token, text, completion, answer.draw, logprob, is_last))
            if is_over or index == len(draft) or token != draft[index]:
                break
            num_right += 1
        if draft:
            self._num_guessed, self._num_right = self._num_guessed + len(draft), self._num_right + num_right
            self.scheduler.computed(row, task.job, num_before + num_right)
        if answer.finish_reason is None:
            self._guess(task, row, answer)
        elif is_last:
            self._forget(task)
        else:
            del task.by_row[row]
            self.scheduler.drop_row(task.job, row)

    def _guess(self, task: _Task, row: Row, answer: Answer) -> None:
        """Guess what follows, where that is wanted."""
        count = min(self.settings.lookup_tokens, task.request.max_tokens - len(answer.ids) - 1)
        if count > 0 and task.request.terms.embeds_TD is None:
            lookup = task.lookups.setdefault(row, Lookup())
            row.draft = lookup.guess(row.ids, count, self.core.text_config.vocab_size if (n := task.request.num_ids) is None else n)

    def _search(self, task: _Task, row: Row, logits_V: Tensor) -> None:
        """Take a beam search one step further when all its rows have been computed; at its end its best answer is told."""
        job, request = task.job, task.request
        assert request.beams is not None
        task.logits[row] = logits_V
        if len(task.logits) < len(job.rows):
            return
        following = request.beams.advance(torch.stack([task.logits[each] for each in job.rows]))
        task.logits = {}
        if following is not None:
            self.runner.copy_pages(self.scheduler.regroup(job, following.parents))
            for each, token in zip(job.rows, following.tokens, strict=True):
                each.ids.append(token)
            self._num_tokens += len(following.tokens)
            return
        best, *others = request.searched()
        answer = task.answers[0]
        for token in best.ids:
            text, is_last = answer.push(token), len(answer.ids) == len(best.ids)
            completion = replace(best, others=tuple(others)) if is_last else None
            self._events.append(TokenEvent(job.number, token, text, completion, is_last=is_last))
        self._forget(task)

    def _fail(self, task: _Task, error: Exception) -> None:
        """End a request that cannot go on; nothing it computed is found again."""
        completion = task.answers[0].failed("error", str(error))
        self._forget(task, is_failed=True)
        self._events.append(TokenEvent(task.job.number, None, "", completion, is_last=True, error=error))

    def _end(self, task: _Task, completion: Completion) -> None:
        """End a request with this completion."""
        self._forget(task)
        self._events.append(TokenEvent(task.job.number, None, "", completion, is_last=True))

    def _forget(self, task: _Task, *, is_failed: bool = False) -> None:
        self.scheduler.end(task.job, is_failed=is_failed)
        del self._tasks[task.job.number]

    @property
    def _loaded(self) -> str:
        return f"loaded are {', '.join(self._adapters) or 'none'}"

    def _adapter(self, name: str) -> tuple[str, Lora | None]:
        """Return what marks an adapter's cache, and the adapter. Raises: PromptError."""
        if not name:
            return "", None
        if name not in self._adapters:
            raise PromptError(f"there is no adapter {name!r}; {self._loaded}")
        return self._adapters[name]

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Check that ids can be looked up. Raises: PromptError."""
        size = self.core.text_config.vocab_size
        bad = [index for index in ids if not 0 <= index < size and index not in self._image_ids]
        if bad:
            raise PromptError(f"ids must lie in 0..{size - 1}, got {min(bad)}..{max(bad)}; does the tokenizer belong to this model?")


def _scored(work: Work, request: Request) -> range:
    """Return the positions whose logits give log probabilities of prompt ids that nobody has noted yet."""
    if request.logprobs_from is None:
        return range(0)
    # After a preemption positions come again.
    begin = max(work.first, request.logprobs_from - 1 + len(request.prompt_logprobs))
    return range(begin, max(begin, min(work.stop, len(request.prompt.ids) - 1)))


def _wanted(work: Work, request: Request) -> list[int]:
    """Return the positions of a work whose logits are wanted: of scored prompt ids, then of the last id and of guesses after it."""
    wanted = list(_scored(work, request))
    num_ids = len(work.row.ids)
    if work.stop >= num_ids and request.terms.scored_from is None:
        wanted += range(num_ids - 1, work.stop)
    return wanted
