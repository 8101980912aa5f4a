"""Weights piece by piece, for what only passes them on.

Owns: PieceReader. Pieces are small enough for a processor's cache and lie in memory that is used again: on a large scale new memory, and
the way to it and back, cost more than all else that a conversion does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llavakit.checkpoint.load import check_finite
from llavakit.checkpoint.opening import Weight
from llavakit.ops.threads import one_thread
from llavakit.storage.tensors import FilePlace

__all__ = ["PieceReader"]

_PIECE_BYTES = 1 << 20
_WIDEST = 4  # times the bytes that a cast may need: float16 to float64


class PieceReader:
    """Reads weights in flat pieces; each is valid until the one after the next is asked for."""

    def __init__(self) -> None:
        """Set aside the memory; pages that are not used are never touched."""
        self._raw = [torch.empty(_PIECE_BYTES, dtype=torch.uint8) for _ in range(2)]
        self._cast = [torch.empty(_PIECE_BYTES * _WIDEST, dtype=torch.uint8) for _ in range(2)]
        self._wide = torch.empty(_PIECE_BYTES // 2)
        self._turn = 0

    def pieces(self, weight: Weight, dtype: torch.dtype) -> Iterator[Tensor]:
        """Read a weight, cast to dtype; in one piece where it does not lie in a file as it is.

        Raises: CheckpointError, also for values that are not finite.
        """
        place, spec = weight.part.tensors.place(weight.name), weight.spec
        if place is None or not spec.num_bytes or not spec.dtype.is_floating_point:
            yield weight.read(dtype).reshape(-1)
            return
        for start in range(0, spec.num_bytes, _PIECE_BYTES):
            self._turn = 1 - self._turn
            piece = self._read(place, start, min(_PIECE_BYTES, spec.num_bytes - start)).view(spec.dtype)
            with one_thread():
                piece = self._to(piece, dtype)
                check_finite(weight.name, piece)
            yield piece

    def _read(self, place: FilePlace, start: int, num_bytes: int) -> Tensor:
        raw = self._raw[self._turn][:num_bytes]
        place.read_into(raw, start)
        return raw

    def _to(self, piece: Tensor, dtype: torch.dtype) -> Tensor:
        if piece.dtype == dtype:
            return piece
        if piece.dtype.itemsize == dtype.itemsize == 2:  # PyTorch is several times slower between the halves directly
            piece = self._wide[: len(piece)].copy_(piece)
        return self._cast[self._turn][: len(piece) * dtype.itemsize].view(dtype).copy_(piece)
