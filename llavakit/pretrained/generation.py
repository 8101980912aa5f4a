"""generate() of the public classes: transformers' arguments in front of the engine's loop.

Owns: what each argument means, and which of them a checkpoint's generation_config.json answers where the caller does not.
Legend: B rows  S positions  D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from llavakit.checkpoint.generation import GenerationDefaults
from llavakit.engine.engine import Engine, EngineSettings
from llavakit.engine.request import Request, ScoreHook, StopHook, Terms
from llavakit.engine.runner import page_shape
from llavakit.errors import InputError
from llavakit.model.llava_config import LlavaConfig
from llavakit.ops.memory import free_memory
from llavakit.ops.pages import PAGE
from llavakit.pretrained.inputs import Batch, check_batch
from llavakit.pretrained.outputs import GenerateOutput
from llavakit.pretrained.pictures import Pictures, gather
from llavakit.pretrained.splice import Slots, splice
from llavakit.processing.processor import Prompt
from llavakit.types import Completion, SamplingParams

__all__ = ["Generation", "Streamer"]

_MAX_NEW_TOKENS = 20  # transformers' default
_TOP_K = 50  # and this, for draws
_MEMORY_SHARE = 0.5  # of what is free, for keys and values
_STEP_TOKENS = 2048
_T = TypeVar("_T")


class Streamer(Protocol):
    """What transformers' TextStreamer is: it is handed the prompt's ids, then each new one."""

    def put(self, value: Tensor) -> None:
        """Take ids."""

    def end(self) -> None:
        """Know that there are no more."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Prompts:
    """The rows of a call without padding, and the ids that come back before the new ones."""

    rows: list[Prompt]
    embeds: list[Tensor | None]
    head_BS: Tensor
    width: int
    """Positions of a padded row."""


class Generation(nn.Module):
    """Generation for a class that is a packed core."""

    config: Any
    generation: GenerationDefaults

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int | None = None,
        min_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        num_beams: int | None = None,
        num_return_sequences: int = 1,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        logits_processor: Sequence[ScoreHook] = (),
        stopping_criteria: Sequence[StopHook] = (),
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        inputs: Tensor | None = None,
        use_cache: bool = True,  # noqa: ARG002 - ids do not depend on it
    ) -> Any:
        """Continue [B, S] ids and return prompt and new ids, shorter rows filled up with the pad id on the right.

        Returns a tensor of ids, or with return_dict_in_generate a GenerateOutput that holds it.

        Pictures (see pictures.gather) belong to the image ids in order over the batch; prompts come back expanded. Padding may lie on
        either side. With inputs_embeds [B, S, D] only new ids come back. max_length and min_length count the padded prompt. With
        num_return_sequences each row comes back so many times. Row i draws from its own generator, seeded with seed + i.
        logits_processor holds callables (ids [1, T], scores [1, V]) -> scores, stopping_criteria such that are asked after each token
        of a row, (ids [1, T], None) -> whether it ends there. What is None comes from the checkpoint's generation_config.json. inputs
        is another name of input_ids; the cache is always used, since ids do not depend on it.
        Raises: InputError, PromptError.
        """
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are the same thing; give one of them")
        given = self.generation
        pictures = self._pictures(images, pixel_values, image_sizes)
        prompts = self._prompts(inputs if input_ids is None else input_ids, inputs_embeds, attention_mask, pictures)
        beams = _first(num_beams, given.num_beams, default=1)
        is_drawn = _first(do_sample, given.do_sample if beams == 1 else None, default=False)
        if (streamer is not None or stopping_criteria) and beams > 1:
            raise InputError("streamer and stopping_criteria need tokens as they come, which no search has; set num_beams to 1")
        new, total = (max_new_tokens, max_length) if max_new_tokens or max_length else (given.max_new_tokens, given.max_length)
        least, least_total = (min_new_tokens, min_length) if min_new_tokens or min_length else (given.min_new_tokens, given.min_length)
        params = SamplingParams(
            max_tokens=_new_tokens(new, total, prompts.width, _MAX_NEW_TOKENS),
            min_tokens=max(0, _new_tokens(least, least_total, prompts.width, 0)),
            temperature=_first(temperature, given.temperature, default=1.0) if is_drawn else 0.0,
            top_k=_first(top_k, given.top_k, default=_TOP_K) if is_drawn else 0,
            top_p=_first(top_p, given.top_p, default=1.0) if is_drawn else 1.0,
            min_p=_first(min_p, given.min_p, default=0.0) if is_drawn else 0.0,
            repetition_penalty=_first(repetition_penalty, given.repetition_penalty, default=1.0),
            no_repeat_ngram_size=_first(no_repeat_ngram_size, given.no_repeat_ngram_size, default=0),
            n=num_return_sequences,
            num_beams=beams,
            length_penalty=_first(length_penalty, given.length_penalty, default=1.0),
            early_stopping=_first(early_stopping, given.early_stopping, default=False),
        )
        ends = self._end_ids(eos_token_id)
        completions = self._run(prompts, params, frozenset(ends), _Calls(tuple(logits_processor), tuple(stopping_criteria), seed, streamer))
        own = (self.config.pad_token_id, self.config.get_text_config().pad_token_id)
        fill = next((pad for pad in (pad_token_id, given.pad_token_id, *own, *ends) if pad is not None), 0)
        sequences = _joined(prompts.head_BS.repeat_interleave(num_return_sequences, 0), completions, fill)
        if not return_dict_in_generate:
            return sequences
        scores = [completion.score for completion in completions if completion.score is not None]
        return GenerateOutput(sequences=sequences, sequences_scores=torch.tensor(scores) if scores else None)

    def _run(self, prompts: _Prompts, params: SamplingParams, end_ids: frozenset[int], calls: _Calls) -> list[Completion]:
        """Answer every row, as often as asked, in order."""
        num_each = params.n if params.num_beams == 1 else 1
        context_len = self.config.get_text_config().context_len
        requests: list[Request] = []
        for prompt, embeds in zip(prompts.rows, prompts.embeds, strict=True):
            terms = Terms(context_len=context_len, end_ids=end_ids, hooks=calls.hooks, stop_hooks=calls.stop_hooks, embeds_TD=embeds)
            requests += [Request(prompt, calls.seeded(params, len(requests) + draw), terms) for draw in range(num_each)]
        if calls.streamer is not None and len(requests) != 1:
            raise InputError(f"a streamer takes one row, got {len(requests)}; call generate row by row")
        if calls.streamer is not None:
            calls.streamer.put(prompts.head_BS.cpu())
        engine = Engine(self, _settings(self, requests))  # type: ignore[arg-type]
        numbers = [engine.add(request) for request in requests]
        answers: dict[int, Completion] = {}
        for event in engine.run():
            if event.error is not None:
                raise event.error
            if calls.streamer is not None:
                calls.streamer.put(torch.tensor([event.token]))
            if event.completion is not None:
                answers[event.request] = event.completion
        if calls.streamer is not None:
            calls.streamer.end()
        return [one for number in numbers for one in (answers[number], *answers[number].others)]

    def _end_ids(self, eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
        if eos_token_id is None:
            return self.generation.end_ids or tuple(self.config.get_text_config().end_ids())
        return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)

    def _pictures(self, images: Any, pixel_values: Any, image_sizes: Any) -> Pictures | None:
        if isinstance(self.config, LlavaConfig):
            return gather(self.config, images=images, pixel_values=pixel_values, image_sizes=image_sizes)
        if images is not None or pixel_values is not None:
            raise InputError("this model is a language model without a vision tower; call generate without pictures")
        return None

    def _prompts(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, pictures: Pictures | None
    ) -> _Prompts:
        """Cut the batch into prompts without padding, each with its own pictures."""
        mask, image_id, counts = attention_mask, -1, pictures.counts if pictures is not None else ()
        if isinstance(self.config, LlavaConfig) and input_ids is not None:
            slots = Slots.of(self.config, counts)
            image_id, spliced = slots.image_id, splice(input_ids, mask, None, slots=slots)
            input_ids, mask = spliced.ids_BS, spliced.attention_mask
        batch = Batch(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=None, past=None)
        check_batch(batch, self.config.get_text_config())
        if input_ids is None:
            assert inputs_embeds is not None
            return _prompts_of_embeds(inputs_embeds, mask, pictures)
        keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        _check_rows(keep)
        rows = [ids_S[keep_S].tolist() for ids_S, keep_S in zip(input_ids, keep, strict=True)]
        nothing = Pictures(torch.empty(0, 3, 1, 1), ())
        shares = [nothing] * len(rows)
        if pictures is not None:
            shares = pictures.split(_num_pictures([ids.count(image_id) for ids in rows], counts))
        prompts = [Prompt(tuple(ids), (False,) * len(ids), own.tiles_N3SS, own.grids) for ids, own in zip(rows, shares, strict=True)]
        return _Prompts(rows=prompts, embeds=[None] * len(rows), head_BS=input_ids, width=input_ids.shape[1])


@dataclass(frozen=True, slots=True)
class _Calls:
    """What a caller wants called, and the seed of its draws."""

    hooks: tuple[ScoreHook, ...]
    stop_hooks: tuple[StopHook, ...]
    seed: int | None
    streamer: Streamer | None

    def seeded(self, params: SamplingParams, number: int) -> SamplingParams:
        """Give a row its own seed; n is counted outside."""
        is_search = params.num_beams > 1
        return replace(params, n=params.n if is_search else 1, seed=None if self.seed is None else self.seed + number)


def _settings(core: Any, requests: Sequence[Request]) -> EngineSettings:
    """Let all requests run together, in as much memory as they can need."""
    weight = core.get_input_embeddings().weight
    rows = [request.params.num_beams for request in requests]
    needs = [-(-(len(request.prompt.ids) + request.max_tokens) // PAGE) * count for request, count in zip(requests, rows, strict=True)]
    room = int(free_memory(weight.device) * _MEMORY_SHARE) // page_shape(core).page_bytes(weight.dtype, weight.device)
    num_blocks = max(max(needs), min(sum(needs), room))
    return EngineSettings(num_blocks=num_blocks, max_batch=sum(rows), step_tokens=_STEP_TOKENS, prefix_cache=False)


def _first(asked: _T | None, given: _T | None, *, default: _T) -> _T:
    """Return the caller's value, else the checkpoint's, else the default."""
    return asked if asked is not None else given if given is not None else default


def _new_tokens(new: int | None, total: int | None, width: int, default: int) -> int:
    """Count new tokens from either spelling; max_new_tokens comes before max_length."""
    if new is not None:
        return new
    return default if total is None else total - width


def _prompts_of_embeds(inputs_embeds: Tensor, mask: Tensor | None, pictures: Pictures | None) -> _Prompts:
    if pictures is not None:
        raise InputError("pictures go where input_ids have image ids; inputs_embeds hold their features already")
    keep = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device) if mask is None else mask.bool()
    _check_rows(keep)
    embeds: list[Tensor | None] = [x_SD[keep_S] for x_SD, keep_S in zip(inputs_embeds, keep, strict=True)]
    lengths = keep.sum(1).tolist()
    rows = [Prompt((0,) * length, (False,) * length, torch.empty(0, 3, 1, 1)) for length in lengths]
    head_BS = torch.empty(len(rows), 0, dtype=torch.int64, device=inputs_embeds.device)
    return _Prompts(rows=rows, embeds=embeds, head_BS=head_BS, width=0)


def _check_rows(keep_BS: Tensor) -> None:
    if not bool(keep_BS.any(1).all()):
        raise InputError("attention_mask hides a whole row; every row needs a token to continue")


def _joined(head_BS: Tensor, completions: Sequence[Completion], fill: int) -> Tensor:
    """Put prompts and new ids side by side, shorter rows filled up."""
    width = max(len(completion.ids) for completion in completions)
    new = [(*completion.ids, *[fill] * (width - len(completion.ids))) for completion in completions]
    return torch.cat((head_BS, torch.tensor(new, device=head_BS.device)), 1)


def _num_pictures(places: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Say how many of the pictures fill each row's places, in order. Raises: InputError when they do not fit."""
    pending, shares = list(counts), []
    for row, wanted in enumerate(places):
        share, filled = 0, 0
        while filled < wanted and pending:
            filled, share = filled + pending.pop(0), share + 1
        if filled != wanted:
            raise InputError(f"row {row} has {wanted} image positions, its {share} pictures give {filled}; build it with the processor")
        shares.append(share)
    return shares
