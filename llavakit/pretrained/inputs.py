"""What callers hand to the batch-shaped forward, checked before any of it is computed with.

Owns: Batch, check_batch, check_id_shape, num_cached. A shape, dtype or value that cannot be meant is one InputError that names it.
Cost: a few comparisons over [B, S] per call. On CUDA each check of values waits for the device; those who cannot wait use the packed
core, as engine and trainer do. The range of ids is checked where they are looked up (model.llava).
Legend: B rows  S new positions  C cached positions  K key-value heads  H head width  D model width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.errors import InputError
from llavakit.model.config import LlamaConfig
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.outputs import Cache

__all__ = ["Batch", "check_batch", "check_id_shape", "num_cached"]

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The tensors of one call; None where the caller gave none."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past: Cache | None
    labels: Tensor | None = None


def check_batch(batch: Batch, config: LlamaConfig) -> None:
    """Check that the tensors fit each other and the model. Raises: InputError."""
    if (batch.input_ids is None) == (batch.inputs_embeds is None):
        raise InputError("give exactly one of input_ids and inputs_embeds")
    if batch.input_ids is not None:
        check_id_shape(batch.input_ids)
        num_rows, num_new = batch.input_ids.shape
    else:
        assert batch.inputs_embeds is not None
        num_rows, num_new = _check_embeds(batch.inputs_embeds, config.hidden_size)
    num_past = 0 if batch.past is None else _check_past(batch.past, config, num_rows)
    if batch.attention_mask is not None:
        _check_mask(batch.attention_mask, num_rows, num_past + num_new)
    if batch.position_ids is not None:
        _check_positions(batch.position_ids, num_rows, num_new)
    if batch.labels is not None:
        _check_labels(batch.labels, num_rows, num_new, config.vocab_size)


def check_id_shape(ids_BS: Tensor) -> None:
    """Check that ids are integers in rows of at least one position. Raises: InputError."""
    if ids_BS.dim() != 2 or ids_BS.numel() == 0 or ids_BS.dtype not in _INTEGERS:
        raise InputError(
            f"input_ids must be integers [B, S] with at least one position, got {_told(ids_BS)}; use the tokenizer's or processor's tensor"
        )


def _check_embeds(x_BSD: Tensor, width: int) -> tuple[int, int]:
    if x_BSD.dim() != 3 or x_BSD.numel() == 0 or x_BSD.shape[2] != width or not x_BSD.is_floating_point():
        raise InputError(f"inputs_embeds must be floats [B, S, {width}] with at least one position, got {_told(x_BSD)}")
    return x_BSD.shape[0], x_BSD.shape[1]


def num_cached(past: Cache | None) -> int:
    """Return how many positions a cache holds. Raises: InputError when it is no pairs of tensors."""
    return 0 if past is None else next((shape[2] for shape in _past_shapes(past) if len(shape) == 4), 0)


def _past_shapes(past: Cache) -> set[tuple[int, ...]]:
    try:
        return {tuple(tensor.shape) for keys, values in past for tensor in (keys, values)}
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError("past_key_values must be one pair (keys, values) for each layer, as a forward of this model returns") from error


def _check_past(past: Cache, config: LlamaConfig, num_rows: int) -> int:
    """Return how many positions the cache holds."""
    shapes, num_past = _past_shapes(past), num_cached(past)
    expected = (num_rows, config.num_kv_heads, num_past, config.head_width)
    if len(past) != config.num_hidden_layers or shapes != {expected}:
        raise InputError(
            f"past_key_values must be {config.num_hidden_layers} layers of keys and values [{num_rows}, {config.num_kv_heads}, C, "
            f"{config.head_width}], got {len(past)} of {sorted(map(list, shapes))}; take those that a forward of this model returned"
        )
    return num_past


def _check_mask(mask_BC: Tensor, num_rows: int, num_all: int) -> None:
    if tuple(mask_BC.shape) != (num_rows, num_all):
        raise InputError(f"attention_mask must be [{num_rows}, {num_all}] (cached and new positions), got {list(mask_BC.shape)}")
    if mask_BC.dtype != torch.bool and bool(((mask_BC != 0) & (mask_BC != 1)).any()):
        raise InputError("attention_mask must be 1 where a token counts and 0 where it is padding, got other values")


def _check_positions(positions: Tensor, num_rows: int, num_new: int) -> None:
    shape = tuple(positions.shape)
    if shape not in ((num_new,), (1, num_new), (num_rows, num_new)) or positions.dtype not in _INTEGERS:
        raise InputError(
            f"position_ids must be integers [{num_rows}, {num_new}] (image ids standing alone count as all their positions), "
            f"got {_told(positions)}"
        )
    if (low := int(positions.min())) < 0:
        raise InputError(f"position_ids must be 0 or more, got {low}")


def _check_labels(labels_BS: Tensor, num_rows: int, num_new: int, vocab_size: int) -> None:
    if tuple(labels_BS.shape) != (num_rows, num_new) or labels_BS.dtype not in _INTEGERS:
        raise InputError(f"labels must be integers [{num_rows}, {num_new}] like the ids, got {_told(labels_BS)}")
    low, high = _range(labels_BS.masked_fill(labels_BS == IGNORE, 0))
    if low < 0 or high >= vocab_size:
        raise InputError(f"labels must be {IGNORE} (no loss) or ids in 0..{vocab_size - 1}, got {low}..{high}")


def _range(values: Tensor) -> tuple[int, int]:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
