"""Declarative renaming of tensors: total, or it fails with every problem at once.

Owns: Layout and plan_load, which decides on names and shapes alone, before any weight is read.
Invariant: each source tensor is taken or dropped with a reason, each target comes from exactly one source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llavakit.errors import CheckpointError, shortened
from llavakit.logs import logger

__all__ = ["Drop", "Layout", "Rename", "plan_load"]

_LOG = logger("checkpoint")
_MAX_LISTED = 30


@dataclass(frozen=True, slots=True)
class Rename:
    """Names that begin with source begin with target in our models."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Names that match the pattern are left out, for a reason."""

    pattern: str
    reason: str


class _Prefixes:
    """A table of prefixes, in which a look-up costs as much as there are different lengths."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Of pairs with the same prefix the first one counts."""
        self._table: dict[str, str] = {}
        for prefix, other in pairs:
            self._table.setdefault(prefix, other)
        self._lengths = sorted({len(prefix) for prefix in self._table}, reverse=True)

    def replaced(self, name: str) -> str | None:
        """Put another prefix in the place of the longest one that fits; None where none does."""
        for length in self._lengths:
            if (other := self._table.get(name[:length])) is not None:
                return other + name[length:]
        return None


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of one kind of file."""

    name: str
    renames: tuple[Rename, ...]
    drops: tuple[Drop, ...] = ()
    _by_source: _Prefixes = field(init=False, repr=False, compare=False)
    _by_target: _Prefixes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_source", _Prefixes((rename.source, rename.target) for rename in self.renames))
        object.__setattr__(self, "_by_target", _Prefixes((rename.target, rename.source) for rename in self.renames))

    def target(self, name: str) -> str | None:
        """Return our name of a tensor by the longest prefix that fits, or None where none does."""
        return self._by_source.replaced(name)

    def source(self, target: str) -> str | None:
        """Return the name that a tensor of ours has in such files: of the longest prefixes that fit, the first in the table."""
        return self._by_target.replaced(target)

    def drop_reason(self, name: str) -> str | None:
        """Return why a tensor is left out, or None where it is not."""
        return next((drop.reason for drop in self.drops if re.fullmatch(drop.pattern, name)), None)


def plan_load(
    parts: Sequence[tuple[Layout, Mapping[str, tuple[int, ...]]]], targets: Mapping[str, tuple[int, ...]], *, tied: Mapping[str, str]
) -> dict[tuple[int, str], str]:
    """Return (part, source name) -> target name for everything that is to be read.

    parts are the files' tensors, names and shapes, each with its layout. tied names targets that share the weight of another one: their
    source may be missing. Raises: CheckpointError listing all unexpected, doubled, missing and misshapen tensors.
    """
    plan: dict[tuple[int, str], str] = {}
    problems: list[str] = []
    owners: dict[str, str] = {}
    for part, layout, source, shape in ((i, layout, *item) for i, (layout, sources) in enumerate(parts) for item in sources.items()):
        reason = layout.drop_reason(source)
        if reason is not None:
            _LOG.debug("left out %s: %s", source, reason)
            continue
        target = layout.target(source)
        if target is None or target not in targets:
            problems.append(f"unexpected {source} {list(shape)}")
        elif target in owners:
            problems.append(f"{source} and {owners[target]} are both {target}")
        elif shape != targets[target]:
            problems.append(f"{source} has shape {list(shape)}, expected {list(targets[target])}")
            owners[target] = source
        else:
            plan[part, source] = target
            owners[target] = source
    problems += [f"missing {target} {list(shape)}" for target, shape in targets.items() if target not in owners and target not in tied]
    if problems:
        names = " and ".join(layout.name for layout, _ in parts)
        raise CheckpointError(f"the tensors are not those of this {names} model: {'; '.join(shortened(problems, _MAX_LISTED))}")
    return plan
