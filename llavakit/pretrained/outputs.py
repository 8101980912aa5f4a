"""What the batch-shaped models return: fields by attribute, by name, or by position without the absent ones."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

__all__ = ["BaseModelOutputWithPast", "Cache", "CausalLMOutputWithPast", "GenerateOutput", "ModelOutput"]

Cache = tuple[tuple[Tensor, Tensor], ...]
"""Per layer the keys (rotated) and values so far, each [B, K, C, H]."""


class ModelOutput:
    """Base of the outputs: output.logits, output["logits"], output[0], output.to_tuple()."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are present, in order."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            value = getattr(self, key)
            if value is None:
                raise KeyError(key)
            return value
        return self.to_tuple()[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModelOutputWithPast(ModelOutput):
    """Output of LlamaModel."""

    last_hidden_state: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLMOutputWithPast(ModelOutput):
    """Output of the causal language models."""

    loss: Tensor | None = None
    logits: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOutput(ModelOutput):
    """Output of generate with return_dict_in_generate: ids, and the scores of a beam search's answers."""

    sequences: Tensor
    sequences_scores: Tensor | None = None
