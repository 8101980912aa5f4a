"""Putting picture features into batches of ids, as original LLaVA and transformers do.

Owns: Slots, splice. A placeholder (-200, or image_token_index on its own) becomes all features of the next picture; a run of
image_token_index that is as long as the features of the next picture or pictures is already expanded and keeps its place.
Legend: B rows  S positions
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.errors import InputError
from llavakit.model.llava import IMAGE_PLACEHOLDER
from llavakit.model.llava_config import LlavaConfig
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.inputs import check_id_shape

__all__ = ["Slots", "Spliced", "has_images", "splice"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """What a model's placeholders become."""

    image_id: int
    """Id that marks a picture's positions."""
    counts: Sequence[int]
    """Positions of each picture, in order over the batch."""
    is_left: bool = False
    """Whether shorter rows are filled up at their beginning."""
    max_len: int | None = None
    """Positions of a row at most."""

    @classmethod
    def of(cls, config: LlavaConfig, counts: Sequence[int]) -> Slots:
        """Read a config; where it names no image token, -200 marks the positions."""
        image_id = IMAGE_PLACEHOLDER if config.image_token_index is None else config.image_token_index
        is_left = config.tokenizer_padding_side == "left"
        return cls(image_id=image_id, counts=counts, is_left=is_left, max_len=config.tokenizer_model_max_length)


@dataclass(frozen=True, slots=True)
class Spliced:
    """Expanded ids (image positions hold the image token), with mask and labels of the same width."""

    ids_BS: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None


def splice(ids_BS: Tensor, attention_mask: Tensor | None, labels: Tensor | None, *, slots: Slots, num_past: int = 0) -> Spliced:
    """Expand the i-th placeholder to slots.counts[i] ids, fill shorter rows up, and mask what was added.

    attention_mask is [B, num_past + S]; with None and rows that end evenly it stays None. Whether the ids fit the pictures is checked
    where the features are put in their place (LlavaCore.embed). Raises: InputError when ids are no integer rows, mask or labels are not
    as wide as ids that must be expanded, or rows become longer than slots.max_len.
    """
    check_id_shape(ids_BS)
    pending = deque(slots.counts)
    repeats = torch.tensor([_repeats(ids_S, slots.image_id, pending) for ids_S in ids_BS.tolist()], device=ids_BS.device)
    is_placeholder_BS = repeats > 0
    ids_BS = ids_BS.masked_fill(is_placeholder_BS, slots.image_id)
    repeats = repeats.clamp(min=1)
    width = int(repeats.sum(1).max())
    if slots.max_len is not None and num_past + width > slots.max_len:
        raise InputError(f"rows have {num_past + width} positions with their pictures, tokenizer_model_max_length is {slots.max_len}")
    if labels is not None and labels.shape == ids_BS.shape and bool(is_placeholder_BS.any()):
        labels = labels.masked_fill(is_placeholder_BS, IGNORE)
    if bool((repeats == 1).all()):
        return Spliced(ids_BS, attention_mask, labels)
    _check_widths(ids_BS, attention_mask, labels, num_past)
    is_even = bool((repeats.sum(1) == width).all())
    if attention_mask is None and not is_even:
        attention_mask = ids_BS.new_ones(ids_BS.shape[0], num_past + ids_BS.shape[1])
    widened = None if attention_mask is None else _widen(attention_mask[:, num_past:], repeats, width, 0, slots.is_left)
    return Spliced(
        _widen(ids_BS, repeats, width, 0, slots.is_left),
        None if attention_mask is None or widened is None else torch.cat((attention_mask[:, :num_past], widened), 1),
        None if labels is None else _widen(labels, repeats, width, IGNORE, slots.is_left),
    )


def has_images(ids_BS: Tensor, config: LlavaConfig) -> bool:
    """Whether ids stand for a picture anywhere."""
    return bool(((ids_BS == IMAGE_PLACEHOLDER) | (ids_BS == Slots.of(config, ()).image_id)).any())


def _check_widths(ids_BS: Tensor, attention_mask: Tensor | None, labels: Tensor | None, num_past: int) -> None:
    for name, values, wide in (("attention_mask", attention_mask, num_past + ids_BS.shape[1]), ("labels", labels, ids_BS.shape[1])):
        expected = [ids_BS.shape[0], wide]
        if values is not None and list(values.shape) != expected:
            raise InputError(f"{name} must be {expected} like the ids, whose image ids are still to be expanded, got {list(values.shape)}")


def _repeats(ids_S: Sequence[int], image_id: int, pending: deque[int]) -> list[int]:
    """Say of each id how many positions its picture takes: 0 for text and for runs that are expanded already.

    pending holds the counts of the pictures that are still to come; those of this row are taken from it.
    """
    repeats: list[int] = []
    for index, group in itertools.groupby(ids_S):
        length = len(list(group))
        if index == image_id and (covered := _num_covered(pending, length)):
            repeats += [0] * length
            for _ in range(covered):
                pending.popleft()
        elif index in (image_id, IMAGE_PLACEHOLDER):
            repeats += [pending.popleft() if pending else 1 for _ in range(length)]
        else:
            repeats += [0] * length
    return repeats


def _num_covered(pending: Iterable[int], length: int) -> int:
    """Return how many of the next pictures take exactly this many positions together, 0 where none do."""
    for number, total in enumerate(itertools.accumulate(pending), 1):
        if total >= length:
            return number if total == length else 0
    return 0


def _widen(values_BS: Tensor, repeats_BS: Tensor, width: int, fill: int, is_left: bool) -> Tensor:
    rows = [values_S.repeat_interleave(repeats_S) for values_S, repeats_S in zip(values_BS, repeats_BS, strict=True)]
    gaps = [(width - row.shape[0], 0) if is_left else (0, width - row.shape[0]) for row in rows]
    return torch.stack([torch.nn.functional.pad(row, gap, value=fill) for row, gap in zip(rows, gaps, strict=True)])
