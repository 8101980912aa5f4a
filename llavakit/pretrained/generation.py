"""generate() of the public classes: transformers' arguments in front of the engine's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.engine.loop import run_requests
from llavakit.engine.request import Request
from llavakit.errors import InputError
from llavakit.geometry import num_image_tokens
from llavakit.model.config import LlavaConfig
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
        images: Tensor | None = None,
        pixel_values: Tensor | None = None,
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

        Pictures [N, 3, side, side] belong to the image ids in order over the batch; prompts come back expanded. Padding may lie on
        either side. Row i draws from its own generator, seeded with seed + i. Raises: InputError, PromptError.
        """
        pixels = images if pixel_values is None else pixel_values
        if images is not None and pixel_values is not None:
            raise InputError("images and pixel_values are the same thing; give one of them")
        prompts, input_ids = self._prompts(input_ids, attention_mask, pixels)
        text = self.config.get_text_config()
        ends = text.eos_token_id if eos_token_id is None else eos_token_id
        end_ids = frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
        requests = [
            Request(
                prompt,
                _sampling(max_new_tokens, None if not do_sample else (temperature, top_k, top_p), None if seed is None else seed + row),
                context_len=text.max_position_embeddings,
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

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None, pixels: Tensor | None) -> tuple[list[Prompt], Tensor]:
        """Cut the batch into prompts without padding, each with its own pictures; returns them and the expanded ids."""
        mask, per_image, image_id = attention_mask, 0, -1
        if isinstance(self.config, LlavaConfig):
            image_id, per_image = self.config.image_token_index, num_image_tokens(self.config.image_grid)
            spliced = splice(input_ids, mask, None, image_id=image_id, tokens_per_image=per_image)
            input_ids, mask = spliced.ids_BS, spliced.attention_mask
        keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        if not bool(keep.any(1).all()):
            raise InputError("attention_mask hides a whole row; every row needs a token to continue")
        prompts, first = [], 0
        for ids_S, keep_S in zip(input_ids, keep, strict=True):
            ids = ids_S[keep_S].tolist()
            count = ids.count(image_id) // per_image if per_image else 0
            tiles = torch.empty(0, 3, 1, 1) if pixels is None else pixels[first : first + count]
            first += count
            prompts.append(Prompt(tuple(ids), (False,) * len(ids), tiles))
        if pixels is not None and first != pixels.shape[0]:
            raise InputError(f"the prompts have places for {first} pictures, got {pixels.shape[0]}")
        return prompts, input_ids


def _sampling(max_new_tokens: int, drawn: tuple[float, int, float] | None, seed: int | None) -> SamplingParams:
    """Translate transformers' arguments into the loop's."""
    if drawn is None:
        return SamplingParams(max_tokens=max_new_tokens)
    temperature, top_k, top_p = drawn
    return SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
