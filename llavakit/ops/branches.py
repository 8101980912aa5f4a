"""Attention over packed sequences of which some continue another one, as two answers continue one prompt.

Owns: Branched. Refuses: branches of branches.
Invariants: a branch gives what its stem and itself would give as one sequence, and nothing of its siblings reaches it; the stem is
computed once; no mask is larger than a branch by what it sees.
Legend: T tokens  N heads  K key-value heads  H head width  B segments  C tokens of a branch  S tokens of its stem and itself
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llavakit.errors import InputError
from llavakit.ops.attention import causal_attention, fused_attention

__all__ = ["Branched", "attend_masked", "attend_whole"]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Neighbouring tokens that attend in one call: a stem with its first branch, or a further branch."""

    length: int
    stem: tuple[int, int] | None = None
    """Of a further branch: the chunk that begins with its stem, and the stem's tokens."""


class Branched:
    """Causal attention in which a segment sees the segment that it continues, and itself."""

    def __init__(self, cu_seqlens: Tensor, stems_B: Tensor, window: int | None = None) -> None:
        """Take cu_seqlens [B+1]: the starts of the segments and, last, T; and of each the segment that it continues, or -1.

        Raises: InputError when a segment continues a later one, or one that continues another.
        """
        self.window = window
        self._chunks = _plan([stop - start for start, stop in pairwise(cu_seqlens.tolist())], stems_B.tolist())
        self._lengths = [chunk.length for chunk in self._chunks]

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:  # noqa: ARG002 - nothing is kept per layer
        """Attend chunk by chunk.

        A further branch is 1.2 (200 tokens after 60) to 18 (20 after 600) times as fast under a mask on a CPU
        (benchmarks/results/preference.json). Elsewhere only attention without a mask has a kernel that groups heads and keeps no scores.
        """
        attend = attend_masked if q_TNH.device.type == "cpu" else attend_whole
        parts = list(zip(q_TNH.split(self._lengths), k_TKH.split(self._lengths), v_TKH.split(self._lengths), strict=True))
        outputs = []
        for chunk, (q, k, v) in zip(self._chunks, parts, strict=True):
            if chunk.stem is None:
                outputs.append(causal_attention(q, k, v, window=self.window))
            else:
                at, length = chunk.stem
                q, k, v = (torch.cat((stem[:length], own)) for stem, own in zip(parts[at], (q, k, v), strict=True))
                outputs.append(attend(q, k, v, length, window=self.window))
        return torch.cat(outputs)


def attend_masked(q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, num_before: int, *, window: int | None = None) -> Tensor:
    """Attend causally with all but the first num_before of S tokens, under a mask; returns o_CNH."""
    length = q_SNH.shape[0]
    seen_CS = torch.ones(length - num_before, length, dtype=torch.bool, device=q_SNH.device).tril(num_before)
    if window is not None and length > window:
        seen_CS = seen_CS.triu(num_before + 1 - window)
    q_1NCH, k_1KSH, v_1KSH = (x.transpose(0, 1).unsqueeze(0) for x in (q_SNH[num_before:], k_SKH, v_SKH))
    return fused_attention(q_1NCH, k_1KSH, v_1KSH, mask=seen_CS).squeeze(0).transpose(0, 1)


def attend_whole(q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, num_before: int, *, window: int | None = None) -> Tensor:
    """Attend causally with all of S tokens and leave out the first num_before; returns o_CNH."""
    return causal_attention(q_SNH, k_SKH, v_SKH, window=window)[num_before:]


def _plan(lengths: list[int], stems: list[int]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    chunk_of: dict[int, int] = {}  # by stem
    for segment, (length, stem) in enumerate(zip(lengths, stems, strict=True)):
        if stem == -1:
            chunk_of[segment] = len(chunks)
            chunks.append(_Chunk(length))
        elif stem not in chunk_of:
            raise InputError(f"segment {segment} must continue an earlier one that continues none (or -1), got {stem}")
        elif stem == segment - 1:
            chunks[-1] = _Chunk(chunks[-1].length + length)
        else:
            chunks.append(_Chunk(length, (chunk_of[stem], lengths[stem])))
    return chunks
