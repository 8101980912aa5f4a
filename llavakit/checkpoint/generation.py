"""generation_config.json: how a checkpoint's authors meant it to generate.

Owns: GenerationDefaults and load_generation. Fields that are not known here are left out, as they are in the file for other programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavakit.errors import CheckpointError
from llavakit.storage.documents import read_optional_json

__all__ = ["GENERATION_NAME", "GenerationDefaults", "load_generation"]

GENERATION_NAME = "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What the file says; None or empty where it says nothing."""

    end_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None


def load_generation(folder: Path) -> GenerationDefaults:
    """Read the file of a folder; an absent one says nothing. Raises: CheckpointError for values of another type."""
    values = read_optional_json(folder / GENERATION_NAME)

    def read(name: str, *kinds: type) -> Any:
        value = values.get(name)
        if value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
            return value
        raise CheckpointError(f"{folder / GENERATION_NAME} has {name}={value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}")

    ends = read("eos_token_id", int, list)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise CheckpointError(f"{folder / GENERATION_NAME} has eos_token_id={ends!r}; expected ids")
    counts = (
        "pad_token_id", "top_k", "no_repeat_ngram_size", "max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_beams",
    )  # fmt: skip
    numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")
    return GenerationDefaults(
        end_ids=tuple(dict.fromkeys(ends)),
        do_sample=read("do_sample", bool),
        early_stopping=read("early_stopping", bool, str),
        **{name: read(name, int) for name in counts},
        **{name: read(name, float, int) for name in numbers},
    )
