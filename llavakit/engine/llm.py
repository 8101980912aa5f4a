"""LLM: the offline interface. Conversations, texts or prompts in, completions out.

Owns: loading model and processor together, feeding the engine without holding all pictures at once, giving results their order.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, overload

import torch

from llavakit.checkpoint.generation import load_generation
from llavakit.checkpoint.load import choose_preprocessing, load_config, load_core, load_processor
from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.placement import choose_device, choose_dtype
from llavakit.engine.engine import FEATURE_BYTES, Engine, EngineSettings
from llavakit.engine.factory import RequestFactory
from llavakit.engine.progress import progress_bar
from llavakit.engine.request import Request, TokenEvent
from llavakit.engine.runner import measure_workspace, page_shape
from llavakit.errors import CapacityError, ConfigError, LlavaError, PromptError
from llavakit.logs import logger
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.surgery import fuse
from llavakit.model.surgery import quantize as make_quantized
from llavakit.ops.memory import free_memory
from llavakit.ops.pages import PAGE
from llavakit.processing.chat import find_template
from llavakit.processing.processor import LlavaProcessor, Prompt
from llavakit.processing.text import TextProcessor
from llavakit.storage.hub import resolve_model
from llavakit.types import Completion, Conversation, SamplingParams, Scored, Usage

__all__ = ["LLM", "MINIATURE", "joined_answers"]

_LOG = logger("engine")
MINIATURE = Path(__file__).parent.parent / "assets" / "miniature"
"""The embedded model that answers when none is named."""
_MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.9}
"""Of what is free after loading, for the cache."""
_STEP_TOKENS = {"cpu": 512, "cuda": 4096}


Processor = LlavaProcessor | TextProcessor


class LLM:
    """A model with its processor, ready to answer: LLaVA, or a language model alone."""

    def __init__(
        self,
        model: str | Path = MINIATURE,
        *,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        device: str = "auto",
        quantize: Literal["none", "int8", "nf4"] = "none",
        max_batch: int = 32,
        kv_memory: int | None = None,
        step_tokens: int | None = None,
        prefix_cache: bool = True,
        lookup_tokens: int = 0,
        adapters: Mapping[str, str | Path] | None = None,
        preprocess: Literal["auto", "crop", "pad"] = "auto",
        template: str | None = None,
        base: str | Path | None = None,
        vision_tower: str | Path | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        """Load a folder or hub id; without one the embedded miniature.

        quantize stores the decoder's products in 8 bits, or in 4 as NF4, loaded on the CPU first: of a 7B 7.7 or 4.8 GB go to the GPU.
        max_batch sequences run together, on kv_memory bytes of cache (None: as much as they can need, or a share of what is free);
        a step computes at most step_tokens tokens; prefix_cache keeps what was computed for questions that begin alike;
        lookup_tokens is how many tokens are guessed per step from the text before, which is faster and changes no answer. adapters are
        PEFT folders by the names under which requests ask for them.
        template is the name of one of ours in place of the files' own. base is the folder or hub id that an adapter, a delta or a
        projector belongs to, vision_tower that of the tower of an original LLaVA that does not hold its own. auto picks CUDA where
        there is one, the files' dtype (bfloat16 for float16 files on a CPU, which is slow in float16), and the files' preprocessing,
        saying where that is not what the weights were trained with. Raises: CheckpointError, ConfigError, CapacityError.
        """
        if quantize not in ("none", "int8", "nf4"):
            raise ConfigError(f"quantize must be none, int8 or nf4, got {quantize!r}")
        chosen_dtype, chosen_device = choose_dtype(dtype), choose_device(device)
        named = None if template is None else find_template(template)
        folder = resolve_model(model, revision=revision, allow_pickle=allow_pickle)
        sources = Sources(base=base, vision_tower=vision_tower, allow_pickle=allow_pickle)
        config = load_config(folder, sources)
        processor = choose_preprocessing(load_processor(folder, config, named, sources), preprocess)
        loading_device = chosen_device if quantize == "none" else torch.device("cpu")
        core = load_core(folder, config, dtype=chosen_dtype, device=loading_device, sources=sources)
        core = _ready(core, quantize, chosen_device, is_dtype_chosen=chosen_dtype is not None)
        end_ids = (*config.get_text_config().end_ids(), *load_generation(folder).end_ids)
        settings = _Settings(max_batch, kv_memory, step_tokens, prefix_cache, lookup_tokens)
        self._take(core, processor, end_ids, settings)
        for name, source in ({} if adapters is None else adapters).items():
            self.load_adapter(name, source, allow_pickle=allow_pickle)

    @classmethod
    def of(
        cls,
        core: LlamaCore | LlavaCore,
        processor: Processor,
        *,
        max_batch: int = 32,
        kv_memory: int | None = None,
        step_tokens: int | None = None,
        prefix_cache: bool = True,
        lookup_tokens: int = 0,
        end_ids: Sequence[int] | None = None,
    ) -> Self:
        """Take a model and a processor that are there already; the model stays as it is, so it is not the fastest.

        end_ids come from the configuration unless they are given, and the processor's are added.
        """
        llm = cls.__new__(cls)
        settings = _Settings(max_batch, kv_memory, step_tokens, prefix_cache, lookup_tokens)
        llm._take(core, processor, core.text_config.end_ids() if end_ids is None else end_ids, settings)
        return llm

    def _take(self, core: LlamaCore | LlavaCore, processor: Processor, end_ids: Iterable[int], settings: _Settings) -> None:
        context_len, engine_settings = settings.planned(core)
        self.core, self.processor = core, processor
        self.requests = RequestFactory(processor, end_ids, context_len)
        self.engine = Engine(core, engine_settings)
        self._boxes: dict[int, deque[TokenEvent]] = {}
        self._lock = threading.RLock()

    @overload
    def chat(
        self,
        conversations: Conversation,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
        adapter: str = "",
        progress: bool = False,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
        adapter: str = "",
        progress: bool = False,
    ) -> list[Completion]: ...
    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
        adapter: str = "",
        progress: bool = False,
    ) -> Completion | list[Completion]:
        """Answer one conversation, or many together; the order is kept. params are for all, or one for each.

        One of many that cannot be answered gives a completion with finish_reason "error" and the reason, and leaves the others alone.
        progress shows a bar on stderr. Raises: PromptError, ImageError, CapacityError where a single conversation cannot be answered.
        """
        if isinstance(conversations, Conversation):
            return self._one(self.requests.chat(conversations, _for_each(params, 1)[0], tenant=tenant, adapter=adapter))
        asked = zip(conversations, _for_each(params, len(conversations)), strict=True)
        make = functools.partial(self.requests.chat, tenant=tenant, adapter=adapter)
        return self._many([functools.partial(make, one, own) for one, own in asked], progress=progress)

    def chat_each(
        self,
        conversations: Iterable[Callable[[], Conversation]],
        params: SamplingParams | None = None,
        *,
        tenant: str = "",
        adapter: str = "",
    ) -> Iterator[tuple[int, Completion]]:
        """Answer conversations without end, each built when its turn comes; yields numbers and answers as they are finished.

        One that cannot be built or answered gives a completion with finish_reason "error". Closing the iterator ends the work.
        """
        return self._each(functools.partial(self._request, build, params, tenant=tenant, adapter=adapter) for build in conversations)

    def _request(self, build: Callable[[], Conversation], params: SamplingParams | None, *, tenant: str, adapter: str) -> Request:
        return self.requests.chat(build(), params, tenant=tenant, adapter=adapter)

    @overload
    def generate(
        self,
        prompts: str | Prompt,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
        adapter: str = "",
        progress: bool = False,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: list[str] | Sequence[Prompt] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
        adapter: str = "",
        progress: bool = False,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: str | Prompt | list[str] | Sequence[Prompt] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
        adapter: str = "",
        progress: bool = False,
    ) -> Completion | list[Completion]:
        """Continue texts, ids, or prompts that the processor made, without any chat template; otherwise as chat().

        A text begins with the tokenizer's bos where the model's prompts do; nothing in it is markup.
        """
        if isinstance(prompts, str | Prompt):
            return self._one(self.requests.text(prompts, _for_each(params, 1)[0], tenant=tenant, adapter=adapter))
        listed: Sequence[str | Prompt | Sequence[int]] = prompts
        asked = zip(listed, _for_each(params, len(listed)), strict=True)
        make = functools.partial(self.requests.text, tenant=tenant, adapter=adapter)
        return self._many([functools.partial(make, one, own) for one, own in asked], progress=progress)

    def stream(
        self, conversation: Conversation, params: SamplingParams | None = None, *, tenant: str = "", adapter: str = ""
    ) -> Iterator[TokenEvent]:
        """Answer one conversation token by token; an answer's last event holds its completion. Closing the iterator ends the work.

        Raises: PromptError, ImageError, CapacityError, at once.
        """
        return self._events(self.requests.chat(conversation, params, tenant=tenant, adapter=adapter))

    def stream_text(
        self, prompt: str | Prompt, params: SamplingParams | None = None, *, tenant: str = "", adapter: str = ""
    ) -> Iterator[TokenEvent]:
        """Continue one text or prompt token by token, as stream() answers conversations."""
        return self._events(self.requests.text(prompt, params, tenant=tenant, adapter=adapter))

    def score(self, conversation: Conversation, candidates: Sequence[str], *, tenant: str = "", adapter: str = "") -> list[Scored]:
        """Return how likely each candidate is as the whole answer, its end included; the pictures are looked at once for all.

        Raises: PromptError for no candidates, an empty one, or a conversation that does not end with a user's turn.
        """
        if not candidates:
            raise PromptError("there is nothing to score; give at least one candidate")
        if not all(candidates):
            raise PromptError("an empty candidate has no tokens to score")
        asked = self.requests.chat(conversation).prompt
        make = functools.partial(self.requests.scored, asked=asked, tenant=tenant, adapter=adapter)
        answered = [conversation.reply(candidate) for candidate in candidates]
        completions = self._many([functools.partial(make, one) for one in answered], progress=False)
        if (error := next((completion.error for completion in completions if completion.error is not None), None)) is not None:
            raise PromptError(f"a candidate cannot be scored: {error}")
        return Scored.of(candidates, [completion.prompt_logprobs or () for completion in completions])

    def load_adapter(self, name: str, source: str | Path, *, revision: str | None = None, allow_pickle: bool = False) -> None:
        """Load a PEFT adapter (folder or hub id); calls with adapter=name go through it. Raises: ConfigError, CheckpointError."""
        with self._lock:
            self.engine.load_adapter(name, source, revision=revision, allow_pickle=allow_pickle)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self.engine.adapters

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; what goes through it goes on to its end. Raises: ConfigError for one that is not there."""
        with self._lock:
            self.engine.drop_adapter(name)

    # Results

    def _submit(self, request: Request, box: deque[TokenEvent]) -> int:
        """Give the engine a request whose events go into a box."""
        with self._lock:
            number = self.engine.add(request)
            self._boxes[number] = box
        return number

    def _await(self, box: deque[TokenEvent]) -> TokenEvent:
        """Return a box's next event; whoever waits steps the engine, for all others too."""
        while True:
            with self._lock:
                if box:
                    return box.popleft()
                for event in self.engine.step():
                    own = self._boxes.get(event.request)
                    if own is not None:
                        own.append(event)
                    if event.is_last:
                        self._boxes.pop(event.request, None)

    def _abandon(self, numbers: Iterable[int]) -> None:
        """End requests whose results nobody wants any more."""
        with self._lock:
            for number in numbers:
                self._boxes.pop(number, None)
                self.engine.abort(number)

    def _events(self, request: Request) -> Iterator[TokenEvent]:
        box: deque[TokenEvent] = deque()
        number = self._submit(request, box)
        return self._following(number, box)

    def _following(self, number: int, box: deque[TokenEvent]) -> Iterator[TokenEvent]:
        try:
            while True:
                event = self._await(box)
                if event.error is not None:
                    raise event.error
                yield event
                if event.is_last:
                    return
        finally:
            self._abandon([number])

    def _one(self, request: Request) -> Completion:
        found = [event for event in self._events(request) if event.completion is not None]
        return joined_answers(found)

    def _many(self, makers: Sequence[Callable[[], Request]], *, progress: bool) -> list[Completion]:
        """Answer many requests and return the answers in order."""
        completions: dict[int, Completion] = {}
        with progress_bar(len(makers), is_shown=progress) as advance:
            for place, completion in self._each(makers):
                completions[place] = completion
                advance(1)
        return [completions[place] for place in range(len(makers))]

    def _each(self, makers: Iterable[Callable[[], Request]]) -> Iterator[tuple[int, Completion]]:
        """Answer many requests, which are made as the engine gets to them, so that only few pictures are held at a time."""
        places: dict[int, int] = {}
        found: dict[int, list[TokenEvent]] = {}
        box: deque[TokenEvent] = deque()
        waiting = enumerate(makers)
        try:
            while True:
                for place, make in itertools.islice(waiting, 2 * self.engine.settings.max_batch - len(places)):
                    try:
                        number = self._submit(make(), box)
                    except LlavaError as error:
                        yield place, _refused(place, error)
                    else:
                        places[number], found[number] = place, []
                if not places:
                    return
                event = self._await(box)
                if event.completion is not None:
                    found[event.request].append(event)
                if event.is_last:
                    if event.error is not None:
                        _LOG.warning("request %d failed: %s", places[event.request], event.error)
                    yield places.pop(event.request), joined_answers(found.pop(event.request))
        finally:
            self._abandon(places)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a caller says of the engine."""

    max_batch: int
    kv_memory: int | None
    step_tokens: int | None
    prefix_cache: bool
    lookup_tokens: int

    def planned(self, core: LlamaCore | LlavaCore) -> tuple[int, EngineSettings]:
        """Return the positions that a request may have, and the engine's settings. Raises: ConfigError, CapacityError."""
        weight = core.get_input_embeddings().weight
        page_bytes = page_shape(core).page_bytes(weight.dtype, weight.device)
        context_len = core.text_config.context_len
        step_tokens = _STEP_TOKENS[weight.device.type] if self.step_tokens is None else self.step_tokens
        most = max(self.max_batch, 1) * -(-context_len // PAGE)
        if self.kv_memory is None:
            workspace = measure_workspace(core, max(step_tokens, 1)) + FEATURE_BYTES if weight.device.type == "cuda" else 0
            room = int(_MEMORY_SHARE[weight.device.type] * free_memory(weight.device)) - workspace
            num_blocks = min(most, room // page_bytes)
        else:
            num_blocks = self.kv_memory // page_bytes
        if num_blocks < 1:
            raise CapacityError(f"a cache needs at least {page_bytes} bytes for {PAGE} tokens; free some memory, or raise kv_memory")
        if num_blocks * PAGE < context_len:
            _LOG.warning("memory holds a cache of %d positions, the model has %d; they limit a request", num_blocks * PAGE, context_len)
        settings = EngineSettings(
            num_blocks=num_blocks,
            max_batch=self.max_batch,
            step_tokens=step_tokens,
            prefix_cache=self.prefix_cache,
            lookup_tokens=self.lookup_tokens,
        )
        return min(context_len, num_blocks * PAGE), settings


def joined_answers(events: Sequence[TokenEvent]) -> Completion:
    """Return the first answer of a request, which holds the others."""
    first, *others = (event.completion for event in sorted(events, key=lambda event: event.answer) if event.completion is not None)
    return replace(first, others=(*first.others, *others)) if others else first


def _refused(place: int, error: LlavaError) -> Completion:
    _LOG.warning("request %d cannot be answered: %s", place, error)
    return Completion("", (), "error", Usage(0, 0), error=str(error))


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Return the parameters of each of count requests. Raises: PromptError when a list has another length."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise PromptError(f"there are {count} requests and {len(params)} params; give one for all, or one for each")
    return list(params)


def _ready(core: LlamaCore | LlavaCore, quantize: str, device: torch.device, *, is_dtype_chosen: bool) -> LlamaCore | LlavaCore:
    """Make a loaded model ready to run on a device, saying what is not as the files have it."""
    is_half = core.get_input_embeddings().weight.dtype == torch.float16
    if is_half and device.type == "cpu" and not is_dtype_chosen:
        _LOG.warning("running float16 weights in bfloat16 on this CPU; choose dtype float32 for more exact answers")
        core = core.to(torch.bfloat16)
    if quantize != "none":
        make_quantized(core, quantize, device)
    if device.type == "cpu":
        dtype = core.get_input_embeddings().weight.dtype
        if not fuse(core, dtype) or quantize != "none":
            kind = dtype if quantize == "none" else quantize
            _LOG.warning("%s products are slow on this CPU, and what is asked together may change an answer's last bits", kind)
    return core
