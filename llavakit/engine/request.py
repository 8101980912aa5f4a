"""A request on its way through the engine, and its answers.

Owns: when an answer ends and why, the text it has shown, the scores of its next token, the draws. Refuses: the model, the cache.
Invariant: an answer's finish_reason is set exactly once; the shown pieces joined are its completion's text.
Legend: V vocabulary  T tokens  D model width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llavakit.engine.beams import BeamSearch
from llavakit.engine.constraint import Constraint
from llavakit.errors import LengthError, PromptError
from llavakit.ops.sampling import adjust, changes_scores, logprobs_of, sample
from llavakit.processing.processor import Prompt
from llavakit.processing.stream import Detokenizer, StopMatcher
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.types import Completion, FinishReason, SamplingParams, TokenLogprob, Usage

__all__ = ["Answer", "Request", "ScoreHook", "StopHook", "Terms", "TokenEvent"]

ScoreHook = Callable[[Tensor, Tensor], Tensor]
"""hook(ids [1, T], scores [1, V]) -> scores [1, V]: a caller's own change of the scores, as transformers' LogitsProcessor."""

StopHook = Callable[[Tensor, None], Tensor | bool]
"""hook(ids [1, T], None) -> whether to stop here: a caller's own end, as transformers' StoppingCriteria without scores."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step gave one request: its number, the token (None where it failed), and the text that became certain."""

    request: int
    token: int | None
    text: str
    completion: Completion | None = None
    """Set with an answer's last event; of a beam search it holds the other answers too."""
    answer: int = 0
    """Which of n answers."""
    logprob: TokenLogprob | None = None
    """Where it was asked for."""
    is_last: bool = False
    """Whether the request is over."""
    error: Exception | None = None
    """Why it failed, with its last event."""


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
    constrain: Callable[[SamplingParams], Constraint] | None = None
    """Makes what keeps an answer in its prescribed form."""
    scored_from: int | None = None
    """Nothing is generated: the log probabilities of the prompt's ids from this one on are wanted."""
    tenant: str = ""
    """Whose request this is: tenants take turns, and share no cache."""
    adapter: str = ""
    """The LoRA adapter that answers; empty is the model itself."""


class Request:
    """A prompt, its parameters and terms.

    It does not know its answers, which know it: a request that is dropped, with its pictures, is gone at once.
    """

    def __init__(self, prompt: Prompt, params: SamplingParams, terms: Terms) -> None:
        """Check that the prompt leaves room for an answer.

        Raises: PromptError when the prompt is empty or fills the context, a constraint cannot be followed, or stop strings come
        without a tokenizer.
        """
        room = terms.context_len - len(prompt.ids)
        if not prompt.ids:
            raise PromptError("the prompt is empty; a model continues at least one token")
        if room < (0 if terms.scored_from is not None else 1):
            raise LengthError(
                f"the prompt has {len(prompt.ids)} tokens and the model's context {terms.context_len}; "
                "shorten it, there is no room to answer"
            )
        self.stops = params.stop if params.ignore_eos else (*params.stop, *terms.stops)
        if self.stops and terms.tokenizer is None:
            raise PromptError("stop strings need a tokenizer; use stop_token_ids, or LLM instead of generate")
        if params.is_constrained and terms.constrain is None:
            raise PromptError("a prescribed form needs a tokenizer; use LLM instead of generate")
        self.prompt, self.params, self.terms = prompt, params, terms
        self.max_tokens = 0 if terms.scored_from is not None else room if params.max_tokens is None else min(room, params.max_tokens)
        self.end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else terms.end_ids)
        self.has_plain_scores = not terms.hooks and not changes_scores(params) and not params.is_constrained
        self.is_greedy = self.has_plain_scores and params.temperature == 0
        adjusted = None if self.has_plain_scores else self.adjusted
        self.beams = None if params.num_beams == 1 else BeamSearch(params, self.end_ids, self.max_tokens, adjusted)
        self.num_answers = 1 if self.beams is not None else params.n
        constrain = terms.constrain if params.is_constrained else None
        self._constraints = [None if constrain is None else constrain(params) for _ in range(self.num_answers)]
        self.prompt_logprobs: list[TokenLogprob] = []
        scores_prompt = terms.scored_from is not None or params.prompt_logprobs is not None
        self.logprobs_from = (1 if terms.scored_from is None else terms.scored_from) if scores_prompt else None
        """The first prompt id whose log probability is wanted."""

    @property
    def num_ids(self) -> int | None:
        """Ids that may be chosen, where the tokenizer says: models have more rows than tokens."""
        return None if self.terms.tokenizer is None else len(self.terms.tokenizer)

    def every(self, ids: Sequence[int]) -> list[int]:
        """Return the prompt's ids, where it has such, and then these."""
        return list(ids) if self.terms.embeds_TD is not None else [*self.prompt.ids, *ids]

    def start_answers(self) -> list[Answer]:
        """Begin its answers; a beam search has one, which is found at its end."""
        return [Answer(self, draw, constraint) for draw, constraint in enumerate(self._constraints)]

    def adjusted(self, scores_V: Tensor, ids: Sequence[int]) -> Tensor:
        """Return scores after penalties and hooks, for an answer of these ids."""
        every = self.every(ids)
        scores_V = adjust(scores_V, self.params, every, len(ids), self.end_ids)
        for hook in self.terms.hooks:
            scores_V = hook(torch.tensor([every], device=scores_V.device), scores_V[None])[0]
        return scores_V

    def searched(self) -> list[Completion]:
        """Return the answers of a finished beam search, best first."""
        assert self.beams is not None
        completions = []
        for found in self.beams.best()[: self.params.n]:
            answer = Answer(self, 0, None)
            for token in found.ids:
                answer.push(token)
                if answer.finish_reason is not None:
                    break
            completions.append(replace(answer.completion(), score=found.score))
        return completions

    def scored(self) -> Completion:
        """Return the completion of a request that generates nothing."""
        return Completion("", (), "stop", Usage(len(self.prompt.ids), 0), prompt_logprobs=tuple(self.prompt_logprobs))


class Answer:
    """One growing answer of a request."""

    def __init__(self, request: Request, draw: int, constraint: Constraint | None) -> None:
        self.request, self.draw = request, draw
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[TokenLogprob] = []
        tokenizer = request.terms.tokenizer
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._matcher = StopMatcher(request.stops)
        self._generator: torch.Generator | None = None
        self._constraint = constraint

    def choose(self, logits_V: Tensor) -> int:
        """Choose the next token from the model's logits."""
        request = self.request
        scores_V = logits_V if request.has_plain_scores else request.adjusted(logits_V, self.ids)
        if self._constraint is not None:
            scores_V = scores_V.masked_fill(~self._constraint.allowed(scores_V.numel()).to(scores_V.device), -torch.inf)
        if request.params.temperature == 0:
            return int(scores_V.argmax())
        return sample(scores_V.cpu(), request.params, self._draws())

    def report(self, logits_V: Tensor, token: int) -> TokenLogprob | None:
        """Note the token's log probability where that is wanted."""
        if self.request.params.logprobs is None:
            return None
        self.logprobs += logprobs_of(logits_V[None], [token], self.request.params.logprobs)
        return self.logprobs[-1]

    def push(self, token: int) -> str:
        """Take the next token, decide whether the answer ends, and return the text that may be shown."""
        self.ids.append(token)
        is_end = token in self.request.end_ids
        if self._constraint is not None and not is_end:
            self._constraint.take(token)
        text = "" if is_end or self._detokenizer is None else self._matcher.push(self._detokenizer.push(token))
        if is_end or self._matcher.is_stopped or self._wants_to_stop():
            self.finish_reason = "stop"
        elif len(self.ids) >= self.request.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not self._matcher.is_stopped and self._detokenizer is not None:
            text += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        self.text += text
        return text

    def completion(self) -> Completion:
        """Return the finished answer."""
        assert self.finish_reason is not None
        request = self.request
        return Completion(
            self.text,
            tuple(self.ids),
            self.finish_reason,
            Usage(len(request.prompt.ids), len(self.ids)),
            logprobs=None if request.params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if request.params.prompt_logprobs is None else tuple(request.prompt_logprobs),
        )

    def failed(self, reason: FinishReason, error: str | None) -> Completion:
        """Return what there is of it, where its request ends before its time."""
        return Completion(self.text, tuple(self.ids), reason, Usage(len(self.request.prompt.ids), len(self.ids)), error=error)

    def _draws(self) -> torch.Generator:
        """Return the answer's own generator; draw i of a seeded request has the seed that follows i times."""
        if self._generator is None:
            self._generator = torch.Generator()
            if self.request.params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.request.params.seed + self.draw)
        return self._generator

    def _wants_to_stop(self) -> bool:
        if self._constraint is not None and self._constraint.is_over:
            return True
        hooks = self.request.terms.stop_hooks
        return any(bool(torch.as_tensor(hook(torch.tensor([self.request.every(self.ids)]), None)).all()) for hook in hooks)
