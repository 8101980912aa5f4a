"""Rows of ids: cutting, padding, and the batch that a call returns.

Owns: what padding, truncation and max_length mean together, as transformers 4.37 reads them.
Deviations: a sequence too short to be cut is an error where 4.37's slow tokenizer logs it and goes on; length counts the tokens
before padding.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from llavakit.errors import InputError

__all__ = ["Batch", "Bounds", "Padder", "Padding", "Side", "TensorKind", "Truncation", "resolve_bounds", "rows_of", "truncate"]

Padding = bool | Literal["longest", "max_length", "do_not_pad"]
Truncation = bool | Literal["longest_first", "only_first", "only_second", "do_not_truncate"]
TensorKind = Literal["pt", "np"]
Side = Literal["left", "right"]

_PADDINGS = ("longest", "max_length", "do_not_pad")
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
_NO_LIMIT = 10**20  # a larger model_max_length means that none is known
_FILLERS = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}


class Batch(UserDict[str, Any]):
    """Columns of a batch by name, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(f"the batch has no column {name!r}")
        return self.data[name]

    def to(self, device: str | torch.device) -> Self:
        """Move the tensors to a device, in place, and return the batch."""
        self.data = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.data.items()}
        return self

    def to_arrays(self, kind: TensorKind) -> Self:
        """Turn the columns into arrays of int64, in place. Raises: InputError when rows differ in length."""
        if kind not in ("pt", "np"):
            raise InputError(f'return_tensors must be "pt", "np" or None, got {kind!r}')
        for name, rows in self.data.items():
            if len({len(row) for row in rows if isinstance(row, Sequence)}) > 1:
                raise InputError("texts of different lengths make a tensor only with padding=True")
            array = np.array(rows, dtype=np.int64)
            self.data[name] = torch.from_numpy(array) if kind == "pt" else array
        return self

    def first_row(self) -> Self:
        """Keep only the first row, without the batch's axis, in place."""
        self.data = {name: rows[0] for name, rows in self.data.items()}
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What is done about lengths."""

    padding: Literal["longest", "max_length"] | None
    truncation: Literal["longest_first", "only_first", "only_second"] | None
    max_length: int | None
    multiple: int | None


def resolve_bounds(
    *, padding: Padding, truncation: Truncation | None, max_length: int | None, multiple: int | None, model_max_length: int
) -> Bounds:
    """Decide what the arguments of a call mean together.

    max_length alone, with padding=False, cuts; without max_length the model's own limit counts, where one is known.
    Raises: InputError for unknown names, or a max_length that is no multiple of pad_to_multiple_of.
    """
    pads: Any = {True: "longest", False: "do_not_pad"}.get(padding, padding) if isinstance(padding, bool) else padding
    if truncation is None:
        truncation = "longest_first" if max_length is not None and padding is False else "do_not_truncate"
    cuts: Any = {True: "longest_first", False: "do_not_truncate"}[truncation] if isinstance(truncation, bool) else truncation
    if pads not in _PADDINGS or cuts not in _TRUNCATIONS:
        raise InputError(f"padding is one of {', '.join(_PADDINGS)} and truncation of {', '.join(_TRUNCATIONS)}; got {pads!r}, {cuts!r}")
    if max_length is None and model_max_length <= _NO_LIMIT:
        max_length = model_max_length
    if max_length is None:
        pads = "do_not_pad" if pads == "max_length" else pads
        cuts = "do_not_truncate"
    elif max_length < 0:
        raise InputError(f"max_length must be 0 or more, got {max_length}")
    if multiple is not None and max_length is not None and pads != "do_not_pad" and cuts != "do_not_truncate" and max_length % multiple:
        raise InputError(
            f"max_length {max_length} is not a multiple of pad_to_multiple_of {multiple}; rows could not be both cut and padded"
        )
    return Bounds(
        padding=None if pads == "do_not_pad" else pads,
        truncation=None if cuts == "do_not_truncate" else cuts,
        max_length=max_length,
        multiple=multiple,
    )


def truncate(
    first: list[int], second: list[int] | None, *, excess: int, strategy: str, side: Side, favours_longer: bool
) -> tuple[list[int], list[int] | None]:
    """Remove excess ids from one or two sequences.

    longest_first takes from the longer one until both are equal, then half from each. The odd one goes from the second in 4.37's
    slow tokenizer; with favours_longer from the one that was shorter, or the first of equals, as the tokenizers library does.
    Raises: InputError when the one that only_first or only_second names is too short.
    """
    if excess <= 0:
        return first, second
    if strategy == "longest_first":
        lengths = [len(first), len(second or ())]
        longer = 0 if lengths[0] > lengths[1] else 1
        removed = [0, 0]
        removed[longer] = min(abs(lengths[0] - lengths[1]), excess)
        rest = excess - sum(removed)
        goes_first = favours_longer and lengths[0] <= lengths[1]
        from_first = rest - rest // 2 if goes_first else rest // 2
        removed = [removed[0] + from_first, removed[1] + rest - from_first]
        if second is None:
            removed = [excess, 0]
    else:
        removed = [excess, 0] if strategy == "only_first" else [0, excess]
        cut = first if strategy == "only_first" else second
        if cut is None or len(cut) <= excess:
            length = "is missing" if cut is None else f"has {len(cut)} tokens"
            raise InputError(f"{excess} tokens must go, but the sequence that {strategy} may cut {length}; use longest_first")
    return _shorten(first, removed[0], side), None if second is None else _shorten(second, removed[1], side)


def _shorten(ids: list[int], count: int, side: Side) -> list[int]:
    return ids[count:] if side == "left" else ids[: max(len(ids) - count, 0)]


@dataclass(frozen=True, slots=True)
class Padder:
    """Fills rows of all columns up to one width."""

    pad_id: int
    side: Side

    def fill(self, columns: Mapping[str, list[list[int]]], bounds: Bounds) -> dict[str, list[list[int]]]:
        """Fill input_ids, attention_mask, token_type_ids and special_tokens_mask; other columns stay as they are."""
        lengths = [len(row) for row in columns["input_ids"]]
        width = bounds.max_length if bounds.padding == "max_length" and bounds.max_length is not None else max(lengths, default=0)
        if bounds.multiple is not None:
            width = math.ceil(width / bounds.multiple) * bounds.multiple
        fillers = {"input_ids": self.pad_id, **_FILLERS}
        return {
            name: [self._fill_row(row, fillers[name], width) for row in rows] if name in fillers else rows for name, rows in columns.items()
        }

    def _fill_row(self, row: list[int], filler: int, width: int) -> list[int]:
        fill = [filler] * (width - len(row))
        return [*fill, *row] if self.side == "left" else [*row, *fill]


def rows_of(inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], bool]:
    """Read what pad() takes, as columns of lists and whether it was a single row. Raises: InputError."""
    if isinstance(inputs, Mapping):
        columns = {name: _listed(value) for name, value in inputs.items()}
    else:
        names = list(inputs[0]) if inputs else []
        columns = {name: [_listed(item[name]) for item in inputs] for name in names}
    if "input_ids" not in columns:
        raise InputError(f"padding needs input_ids; got {', '.join(columns) if columns else 'nothing'}")
    ids = columns["input_ids"]
    is_single = bool(ids) and isinstance(ids[0], int)
    return ({name: [value] for name, value in columns.items()} if is_single else columns), is_single


def _listed(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
