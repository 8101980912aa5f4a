"""Putting picture features into batches of ids, as original LLaVA and transformers do.

Owns: splice. One image id (-200 or image_token_index) standing alone becomes all features of the next picture; a run of
exactly as many ids as a picture has features keeps its place.
Legend: B rows  S positions  D model width  N pictures  P features per picture
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.errors import InputError
from llavakit.model.llava import IMAGE_PLACEHOLDER
from llavakit.ops.loss import IGNORE

__all__ = ["Spliced", "splice"]


@dataclass(frozen=True, slots=True)
class Spliced:
    """Expanded ids (image positions hold the image token), with mask and labels of the same width."""

    ids_BS: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None


def splice(ids_BS: Tensor, attention_mask: Tensor | None, labels: Tensor | None, *, image_id: int, tokens_per_image: int) -> Spliced:
    """Expand lone image ids to tokens_per_image ids, fill shorter rows up on the right, and mask what was added.

    Raises: InputError when a run of image ids is neither 1 nor a multiple of tokens_per_image long.
    """
    ids_BS = ids_BS.masked_fill(ids_BS == IMAGE_PLACEHOLDER, image_id)
    is_image_BS = ids_BS == image_id
    repeats = torch.where(is_image_BS, _repeats(is_image_BS, tokens_per_image), 1)
    if bool((repeats == 1).all()):
        return Spliced(ids_BS, attention_mask, labels)
    mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask
    width = int(repeats.sum(1).max())
    labels_BS = None if labels is None else labels.masked_fill(is_image_BS, IGNORE)
    return Spliced(
        _widen(ids_BS, repeats, width, 0),
        _widen(mask_BS, repeats, width, 0),
        None if labels_BS is None else _widen(labels_BS, repeats, width, IGNORE),
    )


def _repeats(is_image_BS: Tensor, tokens_per_image: int) -> Tensor:
    repeats = torch.ones_like(is_image_BS, dtype=torch.int64)
    for row, is_image_S in enumerate(is_image_BS.tolist()):
        start = None
        for position, is_image in enumerate([*is_image_S, False]):
            if is_image and start is None:
                start = position
            elif not is_image and start is not None:
                length = position - start
                if length == 1:
                    repeats[row, start] = tokens_per_image
                elif length % tokens_per_image:
                    raise InputError(f"row {row} has {length} image ids in a row; a picture is 1 id, or {tokens_per_image} of them")
                start = None
    return repeats


def _widen(values_BS: Tensor, repeats_BS: Tensor, width: int, fill: int) -> Tensor:
    rows = [values_S.repeat_interleave(repeats_S) for values_S, repeats_S in zip(values_BS, repeats_BS, strict=True)]
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[0]), value=fill) for row in rows])
