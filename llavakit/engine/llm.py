"""LLM: the offline interface. Conversations in, completions out.

Owns: loading model and processor together, batches of at most max_batch, streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self, overload

import torch

from llavakit.checkpoint.generation import load_generation
from llavakit.checkpoint.load import load_config, load_core, load_processor
from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.placement import choose_device, choose_dtype
from llavakit.engine.loop import run_requests
from llavakit.engine.request import Request, Terms, TokenEvent
from llavakit.errors import ConfigError, PromptError
from llavakit.logs import logger
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.processing.chat import find_template
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.storage.hub import resolve_model
from llavakit.types import Completion, Conversation, SamplingParams

__all__ = ["LLM", "MINIATURE"]

_LOG = logger("engine")
MINIATURE = Path(__file__).parent.parent / "assets" / "miniature"
"""The embedded model that answers when none is named."""


Processor = LlavaProcessor | TextProcessor


class LLM:
    """A model with its processor, ready to answer: LLaVA, or a language model alone."""

    def __init__(
        self, core: LlamaCore | LlavaCore, processor: Processor, *, max_batch: int = 32, end_ids: Sequence[int] | None = None
    ) -> None:
        """Take the parts; end_ids come from the configuration unless they are given, and the processor's are added."""
        if max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, got {max_batch}")
        self.core, self.processor, self.max_batch = core, processor, max_batch
        self.end_ids = processor.end_ids | frozenset(core.text_config.end_ids() if end_ids is None else end_ids)

    @classmethod
    def load(
        cls,
        model: str | Path = MINIATURE,
        *,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        device: str = "auto",
        max_batch: int = 32,
        preprocess: Literal["auto", "crop", "pad"] = "auto",
        template: str | None = None,
        base: str | Path | None = None,
        vision_tower: str | Path | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
    ) -> Self:
        """Load a folder or hub id; without one the embedded miniature.

        template is the name of one of ours in place of the files' own. base is the folder or hub id that an adapter, a delta or a
        projector belongs to, vision_tower that of the tower of an original LLaVA that does not hold its own. auto picks CUDA where
        there is one, the files' dtype (bfloat16 for float16 files on a CPU, which is slow in float16), and the files' preprocessing,
        saying where that is not what the weights were trained with. Raises: CheckpointError, ConfigError.
        """
        chosen_dtype, chosen_device = choose_dtype(dtype), choose_device(device)
        named = None if template is None else find_template(template)
        folder = resolve_model(model, revision=revision, allow_pickle=allow_pickle)
        sources = Sources(base=base, vision_tower=vision_tower, allow_pickle=allow_pickle)
        config = load_config(folder, sources)
        processor = _chosen(load_processor(folder, config, named, sources), preprocess)
        core = load_core(folder, config, dtype=chosen_dtype, device=chosen_device, sources=sources)
        if chosen_dtype is None and chosen_device.type == "cpu" and next(core.parameters()).dtype == torch.float16:
            _LOG.warning("running float16 weights in bfloat16 on this CPU; choose dtype float32 for more exact answers")
            core = core.to(torch.bfloat16)
        return cls(core, processor, max_batch=max_batch, end_ids=(*config.get_text_config().end_ids(), *load_generation(folder).end_ids))

    @overload
    def chat(self, conversations: Conversation, params: SamplingParams | None = None) -> Completion: ...
    @overload
    def chat(self, conversations: Sequence[Conversation], params: SamplingParams | None = None) -> list[Completion]: ...
    def chat(
        self, conversations: Conversation | Sequence[Conversation], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """Answer one conversation, or many in batches; the order is kept. Raises: PromptError, ImageError."""
        if isinstance(conversations, Conversation):
            return self.chat([conversations], params)[0]
        params = SamplingParams() if params is None else params
        # Draws are requests of their own, a search is one.
        num_each = params.n if params.num_beams == 1 else 1
        completions: list[Completion] = []
        for start in range(0, len(conversations), max(1, self.max_batch // num_each)):
            asked = conversations[start : start + max(1, self.max_batch // num_each)]
            requests = [self._request(conversation, params, draw) for conversation in asked for draw in range(num_each)]
            for _ in run_requests(self.core, requests):
                pass
            answers = [request.completion() for request in requests]
            if num_each == 1:
                completions += answers
            else:
                groups = (answers[first : first + num_each] for first in range(0, len(answers), num_each))
                completions += [replace(first, others=tuple(others)) for first, *others in groups]
        return completions

    def stream(self, conversation: Conversation, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Answer one conversation token by token; the last event holds the completion. Raises: PromptError for n above 1."""
        params = SamplingParams() if params is None else params
        if params.n > 1:
            raise PromptError("a stream holds one answer; set n to 1, or use chat")
        return run_requests(self.core, [self._request(conversation, params)])

    def _request(self, conversation: Conversation, params: SamplingParams, draw: int = 0) -> Request:
        context_len = self.core.text_config.context_len
        if draw and params.seed is not None:
            params = replace(params, seed=params.seed + draw)
        terms = Terms(
            context_len=context_len,
            end_ids=self.end_ids,
            tokenizer=self.processor.tokenizer,
            stops=self.processor.template.stops,
        )
        return Request(self.processor.prompt(conversation, max_len=context_len - 1), params, terms)


def _chosen(processor: Processor, preprocess: Literal["auto", "crop", "pad"]) -> Processor:
    """Return the processor with the preprocessing asked for, or say where the files' own differs from training."""
    if isinstance(processor, TextProcessor):
        if preprocess != "auto":
            raise ConfigError("this model is a language model without a vision tower; leave preprocess out")
        return processor
    if preprocess == "auto":
        if (note := processor.preprocessing_note) is not None:
            _LOG.warning("%s; preprocess=pad does as in training", note)
        return processor
    if processor.image_processor.aspect not in ("crop", "pad"):
        raise ConfigError(f"preprocess {preprocess!r} does not fit a model whose pictures are {processor.image_processor.aspect}")
    return replace(processor, image_processor=replace(processor.image_processor, aspect=preprocess))
