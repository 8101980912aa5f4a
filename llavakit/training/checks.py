"""What can be wrong with a row.

Owns: Fault, Measures, the names of all faults with what each means, and how an error becomes one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llavakit.errors import AnimationError, DataError, ImageError, LlavaError, PromptError

__all__ = ["FAULTS", "PICTURE_FAULTS", "Fault", "FaultError", "Measures", "duplicate_ids", "fault_of", "too_long"]

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
    "missing picture": "a picture is not there, or outside its folder",
    "animated picture": "a picture has several frames",
    "picture": "a picture is damaged, too large, or of no known kind",
    "pair": "it is no pair, its two answers are the same, one is empty, or they follow different prompts",
    "duplicate id": "another row has the same id (the row trains)",
    "empty question": "a question is empty (the row trains)",
    "no last answer": "its last question has no answer (the row trains)",
    "opening answer": "it begins with an answer, which is left out, as in LLaVA (the row trains)",
    "markup in text": "a text spells a template's marker, which stays text (the row trains)",
}
"""Faults by name. Rows with the last five train."""
PICTURE_FAULTS = frozenset(("missing picture", "animated picture", "picture"))
"""Faults that may be gone although the row is the same."""


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
    """Positions, pictures included."""
    num_supervised: int
    """Positions that are learned."""
    num_tiles: int
    """Tiles that the tower sees."""
    problems: tuple[Fault, ...] = ()
    """Everything that is wrong with it."""
    id: str | int | None = None
    """What the row calls itself."""

    @property
    def is_usable(self) -> bool:
        """Whether the row can train."""
        return not any(problem.is_fatal for problem in self.problems)


class FaultError(DataError):
    """A row that cannot train, for a reason that has a name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def fault_of(error: LlavaError, otherwise: str) -> Fault:
    """Name what kept a row from becoming a sample; otherwise is the kind of an error that says nothing closer."""
    match error:
        case FaultError():
            kind = error.kind
        case AnimationError():
            kind = "animated picture"
        case ImageError():
            kind = "picture"
        case PromptError():
            kind = "order"
        case _:
            kind = otherwise
    return Fault(kind, str(error), is_fatal=True)


def too_long(num_tokens: int, most: int | None) -> tuple[Fault, ...]:
    """Find fault with a sample of more tokens than one may have."""
    if most is None or num_tokens <= most:
        return ()
    return (Fault("too long", f"it has {num_tokens} tokens, at most {most} fit", is_fatal=True),)


def duplicate_ids(ids: Sequence[str | int | None]) -> dict[int, Fault]:
    """Find the rows whose id another row has too."""
    counts = Counter(name for name in ids if name is not None)
    return {
        row: Fault("duplicate id", f"{counts[name]} rows have the id {name!r}", is_fatal=False)
        for row, name in enumerate(ids)
        if name is not None and counts[name] > 1
    }
