"""One request on its way through the loop.

Owns: when a request ends and why, the text it has shown, the scores of its next token. Refuses: the model.
Invariant: finish_reason is set exactly once; the shown pieces joined are the completion's text.
Legend: K rows  V vocabulary  T tokens  D model width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.engine.beams import BeamSearch
from llavakit.errors import PromptError
from llavakit.ops.sampling import adjust, changes_scores
from llavakit.processing.processor import Prompt
from llavakit.processing.stream import Detokenizer, StopMatcher
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.types import Completion, FinishReason, SamplingParams, Usage

__all__ = ["Request", "ScoreHook", "StopHook", "Terms", "TokenEvent"]

ScoreHook = Callable[[Tensor, Tensor], Tensor]
"""hook(ids [1, T], scores [1, V]) -> scores [1, V]: a caller's own change of the scores, as transformers' LogitsProcessor."""

StopHook = Callable[[Tensor, None], Tensor | bool]
"""hook(ids [1, T], None) -> whether to stop here: a caller's own end, as transformers' StoppingCriteria without scores."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step gave one request: its number in the batch, the token, and the text that became certain."""

    request: int
    token: int
    text: str
    completion: Completion | None = None
    """Set with the last event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a model and its caller lay down for a request, beside its parameters."""

    context_len: int
    """Positions of prompt and answer together."""
    end_ids: frozenset[int]
    """The model's own end tokens."""
    tokenizer: Tokenizer | None = None
    """Without one the answer is ids alone, and any row of the head may be chosen."""
    stops: tuple[str, ...] = ()
    """Strings that end an answer of this model, besides the caller's; ignored with ignore_eos."""
    hooks: tuple[ScoreHook, ...] = ()
    """Run after the penalties, before temperature and filters."""
    stop_hooks: tuple[StopHook, ...] = ()
    """Asked after each token."""
    embeds_TD: Tensor | None = None
    """The prompt's embeddings, where they are not those of its ids."""


class Request:
    """A prompt, its parameters, and the answer so far."""

    def __init__(self, prompt: Prompt, params: SamplingParams, terms: Terms) -> None:
        """Check that the prompt leaves room for an answer.

        Raises: PromptError when the prompt fills the context, or stop strings come without a tokenizer.
        """
        room = terms.context_len - len(prompt.ids)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(prompt.ids)} tokens and the model's context {terms.context_len}; "
                "shorten it, there is no room to answer"
            )
        self._stops = params.stop if params.ignore_eos else (*params.stop, *terms.stops)
        if self._stops and terms.tokenizer is None:
            raise PromptError("stop strings need a tokenizer; use stop_token_ids, or LLM instead of generate")
        self.prompt, self.params, self.terms = prompt, params, terms
        self.max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self.end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else terms.end_ids)
        self.has_plain_scores = not terms.hooks and not changes_scores(params)
        adjusted = None if self.has_plain_scores else self._adjusted
        self.beams = None if params.num_beams == 1 else BeamSearch(params, self.end_ids, self.max_tokens, adjusted)
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._detokenizer: Detokenizer | None
        self._matcher: StopMatcher
        self._text = ""
        self._restart()

    @property
    def num_ids(self) -> int | None:
        """Ids that may be chosen, where the tokenizer says: models have more rows than tokens."""
        return None if self.terms.tokenizer is None else len(self.terms.tokenizer)

    def scores(self, logits_V: Tensor) -> Tensor:
        """Return the next token's scores after penalties and hooks."""
        return logits_V if self.has_plain_scores else self._adjusted(logits_V, tuple(self.ids))

    def push(self, token: int) -> str:
        """Take the next token, decide whether the request ends, and return the text that may be shown."""
        self.ids.append(token)
        is_end = token in self.end_ids
        text = "" if is_end or self._detokenizer is None else self._matcher.push(self._detokenizer.push(token))
        if is_end or self._matcher.is_stopped or self._wants_to_stop():
            self.finish_reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not self._matcher.is_stopped and self._detokenizer is not None:
            text += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        self._text += text
        return text

    def completion(self) -> Completion:
        """Return the finished answer; of a beam search the best, with the others."""
        assert self.finish_reason is not None
        if self.beams is None:
            return self._completion(None)
        found = self.beams.best()[: self.params.n]
        completions = [self._replayed(answer.ids, answer.score) for answer in found]
        best, *others = completions
        return Completion(best.text, best.ids, best.finish_reason, best.usage, tuple(others), best.score)

    def _replayed(self, ids: Sequence[int], score: float) -> Completion:
        """Turn the ids of a search's answer into a completion."""
        self._restart()
        for token in ids:
            self.push(token)
            if self.finish_reason is not None:
                break
        return self._completion(score)

    def _completion(self, score: float | None) -> Completion:
        assert self.finish_reason is not None
        usage = Usage(len(self.prompt.ids), len(self.ids))
        return Completion(self._text, tuple(self.ids), self.finish_reason, usage, score=score)

    def _restart(self) -> None:
        tokenizer = self.terms.tokenizer
        self.ids, self.finish_reason, self._text = [], None, ""
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._matcher = StopMatcher(self._stops)

    def _wants_to_stop(self) -> bool:
        return any(bool(torch.as_tensor(hook(torch.tensor([self._every(tuple(self.ids))]), None)).all()) for hook in self.terms.stop_hooks)

    def _every(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the prompt's ids, where it has such, and then these."""
        return ids if self.terms.embeds_TD is not None else (*self.prompt.ids, *ids)

    def _adjusted(self, scores_V: Tensor, ids: tuple[int, ...]) -> Tensor:
        every = self._every(ids)
        scores_V = adjust(scores_V, self.params, every, len(ids), self.end_ids)
        for hook in self.terms.hooks:
            scores_V = hook(torch.tensor([every], device=scores_V.device), scores_V[None])[0]
        return scores_V
