"""Deviations: where a checkpoint's own files would feed the weights something else than they were trained with.

Owns: the names of the known deviations, and finding them by rendering the folder's chat template for two conversations and comparing,
stretch by stretch, with the text of the training's template. Refuses: mending files; our own prompts never use them.
Invariant: a difference that has no name is reported as other-markup, so nothing passes in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from llavakit.errors import CheckpointError
from llavakit.processing.chat import TEMPLATES, ChatTemplate
from llavakit.processing.sandbox import render_jinja
from llavakit.processing.segments import segments_text
from llavakit.processing.template_choice import was_trained_padded
from llavakit.types import Conversation, ImagePart, Message, TextPart

__all__ = ["Deviation", "PromptCheck", "preprocessing_deviations"]

_IMAGE = "<image>"
_FIRST, _ANSWER, _SECOND = "what is there?", "a red circle", "and above it?"


@dataclass(frozen=True, slots=True)
class Deviation:
    """One difference between files and training."""

    name: str
    file: str
    """What the file makes."""
    training: str
    """What the weights saw."""
    ours: str
    """What this package feeds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCheck:
    """A chat template file held against the training's template."""

    jinja: str
    trained: ChatTemplate
    ours: ChatTemplate
    bos: str
    eos: str
    is_vision: bool

    def deviations(self) -> list[Deviation]:
        """Find the deviations, each name once."""
        found: dict[str, Deviation] = {}
        try:
            for deviation in (*self._late_picture(), *self._talk()):
                found.setdefault(deviation.name, deviation)
        except CheckpointError as error:
            found["unreadable-template"] = self._deviation("unreadable-template", str(error), repr(self._spelled(self.trained)))
        return list(found.values())

    def _late_picture(self) -> Iterator[Deviation]:
        if not self.is_vision:
            return
        got = self._rendered(Conversation((Message("user", (TextPart(_FIRST), ImagePart(b""))),)))
        if 0 <= got.find(_FIRST) < got.find(_IMAGE):
            yield Deviation(
                "image-after-text", "a picture stays behind the text before it", "a single picture comes first", "it comes first"
            )

    def _talk(self) -> Iterator[Deviation]:
        got = self._rendered(_talk_conversation(is_vision=self.is_vision))
        if self.is_vision and self.bos and self.trained.has_bos and got.startswith(self.bos):
            yield Deviation("double-bos", f"the text begins with {self.bos}, and the tokenizer puts one before it", "one bos", "one bos")
        got = got.removeprefix(self.bos) if self.bos else got
        marks = [*([_IMAGE] if self.is_vision else []), _FIRST, _ANSWER, _SECOND]
        stretches = _cut(got, marks)
        if stretches is None:
            raise CheckpointError(f"the checkpoint's chat template loses messages or pictures: {got!r}")
        expected, findings = self._system(stretches[0])
        yield from findings
        wanted = _cut(self._spelled(expected), marks)
        assert wanted is not None, "our templates lose nothing"
        is_head_known = not findings or expected.system is not None or findings[0].name == "missing-system-line"
        for place, (have, want) in enumerate(zip(stretches, wanted, strict=True)):
            if place == 0 and not is_head_known:
                continue
            before = "" if place == 0 else marks[place - 1]
            for name, shown, needed in _differences(have, want, before=before, end=self._end(), is_last=place == len(marks)):
                yield self._deviation(name, repr(shown), repr(needed))

    def _system(self, head: str) -> tuple[ChatTemplate, list[Deviation]]:
        """Compare system lines; returns the template with which everything else is to be compared."""
        system = self.trained.system
        known = {template.system for template in TEMPLATES.values() if template.system is not None and template.system in head}
        found = max(known, key=len, default=None)
        if found == system:
            return self.trained, []
        ours = "no system line, as the file" if self.ours.system is None else repr(self.ours.system)
        if found is not None:
            return replace(self.trained, system=found), [Deviation("other-system-line", repr(found), repr(system), ours)]
        bare = replace(self.trained, system=None)
        parts = _cut(self._spelled(bare), [_IMAGE if self.is_vision else _FIRST])
        assert parts is not None, "our templates lose nothing"
        is_missing = _letters(head) == _letters(parts[0])
        name, shown = ("missing-system-line", "no system line") if is_missing else ("other-system-line", repr(head))
        return bare, [Deviation(name, shown, repr(system), ours)]

    def _rendered(self, conversation: Conversation) -> str:
        return render_jinja(self.jinja, conversation, bos=self.bos, eos=self.eos, add_generation_prompt=True, has_parts=self.is_vision)

    def _spelled(self, template: ChatTemplate) -> str:
        segments = template.segments(_talk_conversation(is_vision=self.is_vision), add_generation_prompt=True)
        return segments_text(segments, bos=self.bos, eos=self.eos)

    def _end(self) -> str:
        """What ends an answer in training: a named token, a stop string, or eos."""
        return next(iter((*self.trained.end_tokens, *self.trained.stops)), self.eos)

    def _deviation(self, name: str, file: str, expected: str) -> Deviation:
        if self.is_vision:
            return Deviation(name, file, expected, f"as in training (template {self.ours.name})")
        return Deviation(name, file, "unknown", expected)


def preprocessing_deviations(config: Mapping[str, Any], image: Mapping[str, Any], template: ChatTemplate) -> list[Deviation]:
    """Hold the image processor's file against the training of LLaVA-1.5, or against what the config says of it."""
    if not was_trained_padded(config, template) or not image or image.get("do_pad") is True:
        return []
    return [
        Deviation(
            "centre-crop",
            "the middle square of a picture is cut out, the rest is lost",
            "a picture is padded to a square in the mean colour first",
            'as the file says; preprocess="pad", or "do_pad": true in the file, pads',
        )
    ]


def _talk_conversation(*, is_vision: bool) -> Conversation:
    pictures = (ImagePart(b""),) if is_vision else ()
    first = Conversation((Message("user", (*pictures, TextPart(_FIRST))),))
    return first.reply(_ANSWER, TextPart(_SECOND))


def _cut(text: str, marks: list[str]) -> list[str] | None:
    """Return the stretches around the marks in their order; None where one is missing."""
    places = []
    start = 0
    for mark in marks:
        place = text.find(mark, start)
        if place < 0:
            return None
        places.append((place, place + len(mark)))
        start = place + len(mark)
    return [text[left:right] for (_, left), (right, _) in pairwise([(0, 0), *places, (len(text), 0)])]


def _differences(have: str, want: str, *, before: str, end: str, is_last: bool) -> Iterator[tuple[str, str, str]]:
    """Name the differences of one stretch, the one that follows a mark; each comes with what is there and what should be."""
    if before == _IMAGE and not have.startswith("\n"):
        yield "no-newline-after-image", _IMAGE + have, _IMAGE + want
        return
    if before == _ANSWER and end in want and end not in have:
        yield "missing-end-token", before + have, before + want
        want = want.replace(end, "", 1)
    if have == want:
        return
    if _letters(have) != _letters(want):
        yield "other-markup", have, want
        return
    if is_last and have == f"{want} ":
        yield "trailing-space", have, want
        return
    if have.startswith("\n") and want.startswith(" ") and before != _ANSWER:
        yield "newline-before-assistant", have, want
        return
    if have.endswith(" ") and want.endswith("\n"):
        yield "space-after-role", have, want
        have = f"{have[:-1]}\n"
    if len(have) > len(want):
        yield "extra-space", have, want
    elif have.count("\n") < want.count("\n"):
        yield "missing-newline", have, want
    elif have != want:
        yield "missing-space" if len(have) < len(want) else "moved-space", have, want


def _letters(text: str) -> str:
    return "".join(text.split())
