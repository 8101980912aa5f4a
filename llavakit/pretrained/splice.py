"""Putting picture features into batches of ids, as original LLaVA and transformers do.

Owns: splice. A placeholder (-200, or image_token_index on its own) becomes all features of the next picture; a run of
image_token_index that is as long as one or several pictures' features is already expanded and keeps its place.
Legend: B rows  S positions  D model width  N pictures  P features per picture
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.errors import InputError
from llavakit.model.llava import IMAGE_PLACEHOLDER
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.inputs import check_id_shape

__all__ = ["Spliced", "splice"]


@dataclass(frozen=True, slots=True)
class Spliced:
    """Expanded ids (image positions hold the image token), with mask and labels of the same width."""

    ids_BS: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None


def splice(ids_BS: Tensor, attention_mask: Tensor | None, labels: Tensor | None, *, image_id: int, tokens_per_image: int) -> Spliced:
    """Expand placeholders to tokens_per_image ids, fill shorter rows up on the right, and mask what was added.

    Whether the ids fit the pictures is checked where the features are put in their place (LlavaCore.embed).
    Raises: InputError when ids are no integer rows, or mask or labels are not as wide as ids that must be expanded.
    """
    check_id_shape(ids_BS)
    is_placeholder_BS = (ids_BS == IMAGE_PLACEHOLDER) | _is_unexpanded(ids_BS == image_id, tokens_per_image)
    ids_BS = ids_BS.masked_fill(is_placeholder_BS, image_id)
    repeats = torch.where(is_placeholder_BS, tokens_per_image, 1)
    if bool((repeats == 1).all()):
        return Spliced(ids_BS, attention_mask, labels)
    for name, values in (("attention_mask", attention_mask), ("labels", labels)):
        if values is not None and values.shape != ids_BS.shape:
            raise InputError(
                f"{name} must be {list(ids_BS.shape)} like the ids, whose image ids are still to be expanded, got {list(values.shape)}"
            )
    mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask
    width = int(repeats.sum(1).max())
    labels_BS = None if labels is None else labels.masked_fill(is_placeholder_BS, IGNORE)
    return Spliced(
        _widen(ids_BS, repeats, width, 0),
        _widen(mask_BS, repeats, width, 0),
        None if labels_BS is None else _widen(labels_BS, repeats, width, IGNORE),
    )


def _is_unexpanded(is_image_BS: Tensor, tokens_per_image: int) -> Tensor:
    """Mark the image ids in runs whose length is no multiple of tokens_per_image."""
    is_unexpanded_BS = torch.zeros_like(is_image_BS)
    for row, is_image_S in enumerate(is_image_BS.tolist()):
        start = 0
        for is_image, group in itertools.groupby(is_image_S):
            stop = start + len(list(group))
            is_unexpanded_BS[row, start:stop] = is_image and (stop - start) % tokens_per_image != 0
            start = stop
    return is_unexpanded_BS


def _widen(values_BS: Tensor, repeats_BS: Tensor, width: int, fill: int) -> Tensor:
    rows = [values_S.repeat_interleave(repeats_S) for values_S, repeats_S in zip(values_BS, repeats_BS, strict=True)]
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[0]), value=fill) for row in rows])
