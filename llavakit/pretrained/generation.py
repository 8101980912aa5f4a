"""generate() of the public classes: transformers' arguments in front of the engine's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.engine.loop import run_requests
from llavakit.engine.request import Request
from llavakit.errors import InputError
from llavakit.model.llava_config import LlavaConfig
from llavakit.pretrained.pictures import Pictures, gather
from llavakit.pretrained.splice import splice
from llavakit.processing.processor import Prompt
from llavakit.types import SamplingParams

__all__ = ["Generation"]

_MAX_NEW_TOKENS = 20  # transformers' default


class Generation(nn.Module):
    """Generation for a class that is a packed core."""

    config: Any

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        max_new_tokens: int = _MAX_NEW_TOKENS,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Continue [B, S] ids and return prompt and new ids, shorter rows filled up with the pad id on the right.

        Pictures (see pictures.gather) belong to the image ids in order over the batch; prompts come back expanded. Padding may lie on
        either side. Row i draws from its own generator, seeded with seed + i. Raises: InputError, PromptError.
        """
        pictures = None
        if isinstance(self.config, LlavaConfig):
            pictures = gather(self.config, images=images, pixel_values=pixel_values, image_sizes=image_sizes)
        elif images is not None or pixel_values is not None:
            raise InputError("this model is a language model without a vision tower; call generate without pictures")
        prompts, input_ids = self._prompts(input_ids, attention_mask, pictures)
        text = self.config.get_text_config()
        end_ids = text.end_ids() if eos_token_id is None else frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
        requests = [
            Request(
                prompt,
                _sampling(max_new_tokens, None if not do_sample else (temperature, top_k, top_p), None if seed is None else seed + row),
                context_len=text.context_len,
                end_ids=end_ids,
                tokenizer=None,
            )
            for row, prompt in enumerate(prompts)
        ]
        for _ in run_requests(self, requests):  # type: ignore[arg-type]
            pass
        fill = next((pad for pad in (pad_token_id, self.config.pad_token_id, min(end_ids, default=None)) if pad is not None), 0)
        width = max(len(request.ids) for request in requests)
        new = [request.ids + [fill] * (width - len(request.ids)) for request in requests]
        return torch.cat((input_ids, torch.tensor(new, device=input_ids.device)), 1)

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None, pictures: Pictures | None) -> tuple[list[Prompt], Tensor]:
        """Cut the batch into prompts without padding, each with its own pictures; returns them and the expanded ids."""
        mask, image_id, counts = attention_mask, -1, pictures.counts if pictures is not None else ()
        if isinstance(self.config, LlavaConfig):
            image_id = self.config.image_token_index
            spliced = splice(input_ids, mask, None, image_id=image_id, counts=counts)
            input_ids, mask = spliced.ids_BS, spliced.attention_mask
        keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        if not bool(keep.any(1).all()):
            raise InputError("attention_mask hides a whole row; every row needs a token to continue")
        rows = [ids_S[keep_S].tolist() for ids_S, keep_S in zip(input_ids, keep, strict=True)]
        if pictures is None:
            return [Prompt(tuple(ids), (False,) * len(ids), torch.empty(0, 3, 1, 1)) for ids in rows], input_ids
        shares = pictures.split(_num_pictures([ids.count(image_id) for ids in rows], counts))
        prompts = [Prompt(tuple(ids), (False,) * len(ids), own.tiles_N3SS, own.grids) for ids, own in zip(rows, shares, strict=True)]
        return prompts, input_ids


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


def _sampling(max_new_tokens: int, drawn: tuple[float, int, float] | None, seed: int | None) -> SamplingParams:
    """Translate transformers' arguments into the loop's."""
    if drawn is None:
        return SamplingParams(max_tokens=max_new_tokens)
    temperature, top_k, top_p = drawn
    return SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
