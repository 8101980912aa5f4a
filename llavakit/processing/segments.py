"""Segments: the typed pieces of a prompt, and the ids and loss mask that are built from them together.

Owns: Segment, MarkerIds, encode_segments. Refuses: knowing any template.
Invariants: only markers become special ids, whatever a person typed is encoded as text; text segments that follow each other are
one stretch, whose ids are those of the whole stretch (so a template's words and a person's words join as they did in training);
a token that reaches over the border of two segments belongs to the later one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llavakit.errors import CheckpointError, PromptError

__all__ = ["ChatTokenizer", "EncodedChat", "MarkerIds", "Segment", "encode_segments", "find_marker", "num_common", "segments_text"]

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt: text, one picture, the tokenizer's bos or eos, or a special token by name (in text)."""

    kind: Literal["text", "image", "bos", "eos", "token"]
    text: str = ""
    is_supervised: bool = False


class ChatTokenizer(Protocol):
    """What prompts need of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """Id that opens a prompt, where there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends an answer, where there is one."""

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text, in which no token is special."""

    def find_token(self, token: str) -> int | None:
        """Look up a token's id; None where there is no such token."""


@dataclass(frozen=True, slots=True)
class MarkerIds:
    """The ids that markers stand for."""

    image: int
    bos: int | None
    eos: int | None
    tokens: Mapping[str, int]
    """Special tokens by name."""
    has_opening: bool
    """Whether a prompt begins with bos, where the tokenizer has one."""
    around_image: tuple[int, int] | None = None
    """What stands before and after each picture's slots, where something does."""

    def image_ids(self, num_slots: int) -> list[int]:
        """Return the ids of a picture."""
        before, after = ([], []) if self.around_image is None else ([index] for index in self.around_image)
        return [*before, *[self.image] * num_slots, *after]

    def find(self, segment: Segment) -> int:
        """Return the id of a marker. Raises: PromptError when the tokenizer has no bos or eos."""
        match segment.kind:
            case "image":
                return self.image
            case "token":
                return self.tokens[segment.text]
            case kind:
                index = self.bos if kind == "bos" else self.eos
                if index is None:
                    raise PromptError(f"the template needs a {kind} token, and the tokenizer has no {kind} token; name one in its config")
                return index


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Ids with the pictures' slots expanded, and for each whether a model learns to produce it."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    lengths: tuple[int, ...]
    """The ids of each segment; what is missing to all ids is the opening bos."""


def find_marker(tokenizer: ChatTokenizer, token: str, template: str) -> int:
    """Look up a special token that a template needs. Raises: CheckpointError naming it where the tokenizer lacks it."""
    index = tokenizer.find_token(token)
    if index is None:
        raise CheckpointError(f"template {template!r} needs the token {token!r}, which the tokenizer lacks; choose a template that fits it")
    return index


def encode_segments(segments: Sequence[Segment], encode: Encode, markers: MarkerIds, slots: Iterable[int]) -> EncodedChat:
    """Concatenate the opening bos and the segments' ids; the i-th picture takes the i-th of slots positions, and what is around it."""
    opening = [markers.bos] if markers.has_opening and markers.bos is not None else []
    ids, mask, counts = list(opening), [False] * len(opening), []
    remaining = iter(slots)
    for is_text, group in itertools.groupby(segments, lambda segment: segment.kind == "text"):
        run = list(group)
        if is_text:
            parts = _encode_stretch([segment.text for segment in run], encode)
        else:
            parts = [markers.image_ids(next(remaining)) if segment.kind == "image" else [markers.find(segment)] for segment in run]
        for segment, part in zip(run, parts, strict=True):
            ids += part
            mask += [segment.is_supervised] * len(part)
            counts.append(len(part))
    return EncodedChat(tuple(ids), tuple(mask), tuple(counts))


def segments_text(segments: Iterable[Segment], *, bos: str = "<s>", eos: str = "</s>", image: str = "<image>") -> str:
    """Spell a prompt out, markers by name; the opening bos is the tokenizer's to add and not part of it."""
    names = {"bos": bos, "eos": eos, "image": image}
    return "".join(names.get(segment.kind, segment.text) for segment in segments)


def _encode_stretch(texts: Sequence[str], encode: Encode) -> list[Sequence[int]]:
    """Encode texts that follow each other to the ids of the whole, and share these among the texts."""
    if len(texts) == 1:
        return [encode(texts[0])]
    parts: list[Sequence[int]] = []
    for group in _cut_at_words(texts, encode):
        whole = encode("".join(group))
        ends = [num_common(encode("".join(group[:count])), whole) for count in range(1, len(group))]
        parts += [whole[start:end] for start, end in itertools.pairwise((0, *ends, len(whole)))]
    return parts


def _cut_at_words(texts: Sequence[str], encode: Encode) -> list[list[str]]:
    """Cut where a text begins a word and words are encoded alone, as Llama's sentencepiece does: it saves encoding twice.

    The space goes: such a tokenizer puts one before whatever it encodes.
    """
    begins_words = list(encode("a b")) == [*encode("a"), *encode("b")]
    groups = [[texts[0]]]
    for before, text in itertools.pairwise(texts):
        if begins_words and text[:1] == " " and len(text) > 1 and before and before[-1] != " ":
            groups.append([text[1:]])
        else:
            groups[-1].append(text)
    return groups


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), min(len(first), len(second))
    )
