"""Putting picture features into batches of ids, as original LLaVA and transformers do.

Owns: splice. A placeholder (-200, or image_token_index on its own) becomes all features of the next picture; a run of
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
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.inputs import check_id_shape

__all__ = ["Spliced", "splice"]


@dataclass(frozen=True, slots=True)
class Spliced:
    """Expanded ids (image positions hold the image token), with mask and labels of the same width."""

    ids_BS: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None


def splice(ids_BS: Tensor, attention_mask: Tensor | None, labels: Tensor | None, *, image_id: int, counts: Sequence[int]) -> Spliced:
    """Expand the i-th placeholder to counts[i] ids, fill shorter rows up on the right, and mask what was added.

    Whether the ids fit the pictures is checked where the features are put in their place (LlavaCore.embed).
    Raises: InputError when ids are no integer rows, or mask or labels are not as wide as ids that must be expanded.
    """
    check_id_shape(ids_BS)
    pending = deque(counts)
    repeats = torch.tensor([_repeats(ids_S, image_id, pending) for ids_S in ids_BS.tolist()], device=ids_BS.device)
    is_placeholder_BS = repeats > 0
    ids_BS = ids_BS.masked_fill(is_placeholder_BS, image_id)
    repeats = repeats.clamp(min=1)
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


def _widen(values_BS: Tensor, repeats_BS: Tensor, width: int, fill: int) -> Tensor:
    rows = [values_S.repeat_interleave(repeats_S) for values_S, repeats_S in zip(values_BS, repeats_BS, strict=True)]
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[0]), value=fill) for row in rows])
