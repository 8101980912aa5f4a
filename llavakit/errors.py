"""Every error that llavakit raises on purpose.

Owns: the exception tree, and how long lists of problems are told. Invariant: each message says what was expected, what came, and the fix.
The command line maps the five families to exit codes (cli/exits); everything else is a bug.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AnimationError",
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FormError",
    "ImageError",
    "InputError",
    "LengthError",
    "LlavaError",
    "NumericError",
    "PromptError",
    "StorageError",
    "TrainingError",
    "few",
    "shortened",
]


class LlavaError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(LlavaError):
    """A configuration value is missing, unknown, of the wrong type or out of range."""


class CheckpointError(LlavaError):
    """A checkpoint folder is incomplete, damaged, unsafe or of an unsupported kind."""


class StorageError(LlavaError):
    """Files could not be written or are not what their manifest says."""


class InputError(LlavaError):
    """What the user asks about cannot be used."""


class ImageError(InputError):
    """The bytes are not a picture that may be decoded."""


class AnimationError(ImageError):
    """The picture has several frames."""


class PromptError(InputError):
    """The conversation cannot become a prompt for this model."""


class LengthError(PromptError):
    """The prompt has more tokens than fit."""


class FormError(PromptError):
    """The prescribed form of an answer cannot be followed."""


class DataError(InputError):
    """Training or evaluation data that cannot be used."""


class CapacityError(LlavaError):
    """The machine lacks the memory, disk or context length that the request needs."""


class BusyError(CapacityError):
    """Too much is going on, or the engine is shutting down: the same request may be answered later."""


class NumericError(LlavaError):
    """A model's numbers are not finite: its weights or its input are out of range."""


class TrainingError(LlavaError):
    """Training cannot go on: it diverged, was interrupted, or its run folder belongs to other settings."""


def shortened(problems: Sequence[str], most: int = 20) -> list[str]:
    """Return the first of many problems, and how many more there are."""
    more = len(problems) - most
    return [*problems[:most], *([f"and {more} more"] if more > 0 else [])]


def few(names: Sequence[str], most: int) -> str:
    """Return the first of many names, with dots for the rest."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
