"""The special tokens around one or two sequences of ids.

Owns: Frame, made from the bos and eos flags or read from a tokenizer.json's post-processor, and what follows from it: framed
ids, token types, the mask of special tokens. Refuses: post-processors that are not templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavakit.errors import CheckpointError

__all__ = ["Frame", "Framed", "Slot", "frame_of_flags", "frame_of_json"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a frame: special ids, or a sequence by its number."""

    type_id: int
    ids: tuple[int, ...] = ()
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Framed:
    """Ids with their specials, and of each its token type and whether the frame put it there."""

    ids: list[int]
    type_ids: list[int]
    special_mask: list[int]


@dataclass(frozen=True, slots=True)
class Frame:
    """Where special tokens stand."""

    single: tuple[Slot, ...]
    pair: tuple[Slot, ...]

    def build(self, first: Sequence[int], second: Sequence[int] | None = None) -> Framed:
        """Put the special tokens around one or two sequences."""
        sequences = (first,) if second is None else (first, second)
        framed = Framed([], [], [])
        for slot in self.single if second is None else self.pair:
            part = slot.ids if slot.sequence is None else sequences[slot.sequence]
            framed.ids.extend(part)
            framed.type_ids.extend([slot.type_id] * len(part))
            framed.special_mask.extend([int(slot.sequence is None)] * len(part))
        return framed

    def num_special(self, *, is_pair: bool) -> int:
        """Count the special tokens."""
        return sum(len(slot.ids) for slot in (self.pair if is_pair else self.single))

    @staticmethod
    def plain() -> Frame:
        """Return the frame without special tokens."""
        return _PLAIN

    @property
    def head(self) -> tuple[int, ...]:
        """Ids before a single sequence."""
        return self.single[0].ids

    @property
    def tail(self) -> tuple[int, ...]:
        """Ids after a single sequence."""
        return self.single[-1].ids


_PLAIN = Frame((Slot(0, sequence=0),), (Slot(0, sequence=0), Slot(1, sequence=1)))


def frame_of_flags(bos_id: int | None, eos_id: int | None) -> Frame:
    """Put bos before and eos after each sequence, where they are given."""

    def around(number: int) -> tuple[Slot, ...]:
        head = () if bos_id is None else (Slot(number, (bos_id,)),)
        tail = () if eos_id is None else (Slot(number, (eos_id,)),)
        return (*head, Slot(number, sequence=number), *tail)

    return Frame(around(0), around(0) + around(1))


def frame_of_json(post_processor: Mapping[str, Any] | None) -> Frame:
    """Read the frame of a tokenizer.json. Raises: CheckpointError for a post-processor that is no template."""
    match post_processor:
        case None | {"type": "ByteLevel"}:
            return _PLAIN
        case {"type": "Sequence", "processors": list(parts)}:
            frames = [frame for frame in map(frame_of_json, parts) if frame != _PLAIN]
            if len(frames) > 1:
                raise CheckpointError("tokenizer.json has two templates in its post-processor; expected one")
            return frames[0] if frames else _PLAIN
        case {"type": "TemplateProcessing", "single": list(single), "pair": list(pair), "special_tokens": dict(tokens)}:
            frame = Frame(tuple(_slot(piece, tokens) for piece in single), tuple(_slot(piece, tokens) for piece in pair))
            for slots, sequences in ((frame.single, [0]), (frame.pair, [0, 1])):
                if sorted(slot.sequence for slot in slots if slot.sequence is not None) != sequences:
                    raise CheckpointError("tokenizer.json has a template in its post-processor that does not hold each sequence once")
            return frame
        case _:
            kind = post_processor.get("type") if isinstance(post_processor, Mapping) else post_processor
            raise CheckpointError(
                f"tokenizer.json has the post-processor {kind!r}; known are TemplateProcessing, ByteLevel and their Sequence"
            )


def _slot(piece: Mapping[str, Any], tokens: Mapping[str, Any]) -> Slot:
    match piece:
        case {"Sequence": {"id": "A" | "B" as name, "type_id": int(type_id)}}:
            return Slot(type_id, sequence="AB".index(name))
        case {"SpecialToken": {"id": str(name), "type_id": int(type_id)}} if name in tokens:
            return Slot(type_id, tuple(tokens[name]["ids"]))
        case _:
            raise CheckpointError(f"tokenizer.json has {piece!r} in its template; expected a sequence or a listed special token")
