"""LLM: the offline interface. Conversations in, completions out.

Owns: loading model and processor together, batches of at most max_batch, streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self, overload

import torch

from llavakit.checkpoint.load import load_config, load_core
from llavakit.engine.loop import run_requests
from llavakit.engine.request import Request, TokenEvent
from llavakit.errors import CheckpointError, ConfigError
from llavakit.logs import logger
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.processor import LlavaProcessor
from llavakit.storage.hub import resolve_model
from llavakit.types import Completion, Conversation, SamplingParams

__all__ = ["LLM", "MINIATURE"]

_LOG = logger("engine")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MINIATURE = Path(__file__).parent.parent / "assets" / "miniature"
"""The embedded model that answers when none is named."""


class LLM:
    """A model with its processor, ready to answer."""

    def __init__(self, core: LlamaCore | LlavaCore, processor: LlavaProcessor, *, max_batch: int = 32) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, got {max_batch}")
        self.core, self.processor, self.max_batch = core, processor, max_batch

    @classmethod
    def load(
        cls,
        model: str | Path = MINIATURE,
        *,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        device: str = "auto",
        max_batch: int = 32,
    ) -> Self:
        """Load a folder or hub id; without one the embedded miniature.

        auto picks CUDA where there is one, and the files' dtype (bfloat16 for float16 files on a CPU, which is slow in float16).
        Raises: CheckpointError, ConfigError.
        """
        folder = resolve_model(model)
        if not isinstance(load_config(folder), LlavaConfig):
            raise CheckpointError(f"{folder} is a language model without a vision tower; load it with LlamaForCausalLM")
        if dtype != "auto" and dtype not in _DTYPES:
            raise ConfigError(f"dtype must be auto or one of {', '.join(_DTYPES)}, got {dtype!r}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        core = load_core(folder, dtype=_DTYPES.get(dtype), device=device)
        if dtype == "auto" and device == "cpu" and next(core.parameters()).dtype == torch.float16:
            _LOG.warning("running float16 weights in bfloat16 on this CPU; choose dtype float32 for more exact answers")
            core = core.to(torch.bfloat16)
        return cls(core, LlavaProcessor.from_pretrained(folder), max_batch=max_batch)

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
        completions: list[Completion] = []
        for start in range(0, len(conversations), self.max_batch):
            requests = [self._request(conversation, params) for conversation in conversations[start : start + self.max_batch]]
            for _ in run_requests(self.core, requests):
                pass
            completions += [request.completion() for request in requests]
        return completions

    def stream(self, conversation: Conversation, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Answer one conversation token by token; the last event holds the completion."""
        return run_requests(self.core, [self._request(conversation, params)])

    def _request(self, conversation: Conversation, params: SamplingParams | None) -> Request:
        context_len = self.core.text_config.max_position_embeddings
        params = SamplingParams() if params is None else params
        if not params.ignore_eos:
            params = replace(params, stop=(*params.stop, *self.processor.template.stops))
        return Request(
            self.processor.prompt(conversation, max_len=context_len - 1),
            params,
            context_len=context_len,
            end_ids=self.processor.end_ids,
            tokenizer=self.processor.tokenizer,
        )
