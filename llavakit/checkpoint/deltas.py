"""Delta weights: a checkpoint that holds its difference from another one.

Owns: Summed, the tensors of a delta with its base added. Sums are made in float32 and have the delta's dtype, which is exact.
Source: llava/model/apply_delta.py. Rows that the base's vocabulary lacks are whole, and so is the projector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from llavakit.errors import CheckpointError, shortened
from llavakit.storage.tensors import TensorSource, TensorSpec

__all__ = ["Summed"]

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_WHOLE = ("model.mm_projector.", "model.vision_tower.", "model.image_newline")
_NORM = ".input_layernorm.weight"
_CONSTANT = ".rotary_emb.inv_freq"


class Summed:
    """Each tensor of a delta plus the base's of the same name."""

    def __init__(self, delta: TensorSource, base: TensorSource) -> None:
        """Take both, open. Raises: CheckpointError where they do not belong together."""
        self._delta, self._base = delta, base
        self.specs: Mapping[str, TensorSpec] = delta.specs
        others = base.specs
        problems = [f"{name} is not in the base" for name in self.specs if not name.startswith(_WHOLE) and not self._fits(name, others)]
        problems += [f"{name} is only in the base" for name in others if name not in self.specs and not name.endswith(_CONSTANT)]
        if problems:
            raise CheckpointError(f"the base is not the one that these deltas were taken from: {'; '.join(shortened(problems))}")
        self._check_delta()

    def read(self, name: str) -> Tensor:
        """Read one tensor, the base's added."""
        delta = self._delta.read(name)
        if name.startswith(_WHOLE) or name.endswith(_CONSTANT):
            return delta
        base = self._base.read(name)
        total = delta.float()
        total[: base.shape[0]] += base.float()
        return total.to(delta.dtype)

    def place(self, name: str) -> None:
        """Sums lie nowhere."""

    def in_file_order(self) -> Iterator[str]:
        """Iterate over names in the order that disks like."""
        return self._delta.in_file_order()

    def _check_delta(self) -> None:
        """Check a norm's weights: a whole model's are near the base's, a delta's near nothing. Raises: CheckpointError."""
        name = next((name for name in self.specs if name.endswith(_NORM) and name in self._base.specs), None)
        if name is None:
            return
        delta, base = self._delta.read(name).float(), self._base.read(name).float()
        if (delta - base).abs().sum() < 0.5 * delta.abs().sum():
            raise CheckpointError("these weights are a whole model's, not what is to be added to a base; leave the base out")

    def _fits(self, name: str, others: Mapping[str, TensorSpec]) -> bool:
        if name.endswith(_CONSTANT):
            return True
        if name not in others:
            return False
        shape, other = self.specs[name].shape, others[name].shape
        return shape == other or (name in _VOCABULARY and shape[1:] == other[1:] and shape[0] > other[0])
