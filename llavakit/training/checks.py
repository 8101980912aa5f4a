"""What can be wrong with a row.

Owns: Fault, Measures, and the names of all faults with what each means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FAULTS", "Fault", "Measures"]

FAULTS: Mapping[str, str] = {
    "form": "the row is of no known form",
    "turn": "a turn lacks a speaker or a text, or has another one",
    "picture name": "image is no file name",
    "marks": "it has other numbers of <image> marks and of pictures",
    "order": "its turns are no conversation that the template can hold",
    "no answer": "there is nothing to learn in it",
    "empty answer": "an answer is empty",
    "nothing learned": "no token of it is learned",
    "too long": "it has more tokens than a sample may have; nothing is ever cut",
    "picture": "a picture is missing, damaged, too large, or outside its folder",
    "pair": "its two answers are the same, one is empty, or they follow different prompts",
    "duplicate id": "another row has the same id (the row trains)",
    "empty question": "a question is empty (the row trains)",
    "markup in text": "a text spells a template's marker, which stays text (the row trains)",
}
"""Faults by name. Rows with the last three train."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a row."""

    kind: str
    """One of FAULTS."""
    message: str
    is_fatal: bool
    """Whether the row cannot train."""


@dataclass(frozen=True, slots=True)
class Measures:
    """What a row will become."""

    num_tokens: int
    num_supervised: int
    num_tiles: int
    problems: tuple[Fault, ...] = ()
