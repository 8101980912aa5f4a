"""One request on its way through the loop.

Owns: when a request ends and why, and the text it has shown. Refuses: tensors' arithmetic and the model.
Invariant: finish_reason is set exactly once; the shown pieces joined are the completion's text.
"""

from __future__ import annotations

from dataclasses import dataclass

from llavakit.errors import PromptError
from llavakit.processing.processor import Prompt
from llavakit.processing.stream import Detokenizer, StopMatcher
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.types import Completion, FinishReason, SamplingParams, Usage

__all__ = ["Request", "TokenEvent"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step gave one request: its number in the batch, the token, and the text that became certain."""

    request: int
    token: int
    text: str
    completion: Completion | None = None
    """Set with the last event."""


class Request:
    """A prompt, its parameters, and the answer so far."""

    def __init__(
        self, prompt: Prompt, params: SamplingParams, *, context_len: int, end_ids: frozenset[int], tokenizer: Tokenizer | None
    ) -> None:
        """Check that the prompt leaves room for an answer; without a tokenizer the answer is ids alone.

        Raises: PromptError when the prompt fills the context, or stop strings come without a tokenizer.
        """
        room = context_len - len(prompt.ids)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(prompt.ids)} tokens and the model's context {context_len}; shorten it, there is no room to answer"
            )
        if params.stop and tokenizer is None:
            raise PromptError("stop strings need a tokenizer; use stop_token_ids, or LLM instead of generate")
        self.prompt, self.params = prompt, params
        self.max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_ids)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._matcher = StopMatcher(params.stop)
        self._text = ""

    def push(self, token: int) -> str:
        """Take the next token, decide whether the request ends, and return the text that may be shown."""
        self.ids.append(token)
        is_end = token in self._end_ids
        text = "" if is_end or self._detokenizer is None else self._matcher.push(self._detokenizer.push(token))
        if is_end or self._matcher.is_stopped:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not self._matcher.is_stopped and self._detokenizer is not None:
            text += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        self._text += text
        return text

    def completion(self) -> Completion:
        """Return the finished answer."""
        assert self.finish_reason is not None
        return Completion(self._text, tuple(self.ids), self.finish_reason, Usage(len(self.prompt.ids), len(self.ids)))
