"""The chat template of a language model alone, whose own file is all that says how it talks.

Owns: template_of_text_checkpoint: the file's markup is read off from what it makes of a few conversations, and every conversation
that we build from it is compared with the file's. Refuses: LLaVA's checkpoints, whose weights were trained with a known template that
their files often miss.
Invariant: a prompt is never the file's output, in which a person's words could spell a token; it is built from parts as all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llavakit.errors import CheckpointError, PromptError
from llavakit.logs import logger
from llavakit.processing.chat import ChatTemplate, Turns
from llavakit.processing.jinja import template_of_jinja
from llavakit.processing.sandbox import render_jinja
from llavakit.processing.segments import segments_text
from llavakit.processing.template_choice import TemplateChoice, template_of_checkpoint
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.types import Conversation, Message, Role, TextPart

__all__ = ["template_of_text_checkpoint"]

_LOG = logger("processing")
_BOS, _EOS = "<s>", "</s>"
_SYSTEM, _FIRST, _ANSWER, _SECOND = "Be short.", "what is there?", "a red circle", "and above it?"
_TALK: tuple[tuple[Role, str], ...] = (("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND), ("assistant", "no"), ("user", "go on"))


def template_of_text_checkpoint(folder: Path, tokenizer: Tokenizer, *, named: ChatTemplate | None = None) -> TemplateChoice:
    """Choose the template of a language model's folder, or take the one that the caller names.

    The name is that of a family where the file does what the family does, else "own". Raises: CheckpointError.
    """
    return template_of_checkpoint(folder, named=named, recognise=lambda text: _template_of_file(text, tokenizer))


def _template_of_file(text: str, tokenizer: Tokenizer) -> ChatTemplate:
    file = _File(text, bos=_BOS if tokenizer.bos_token_id is not None else "", eos=_EOS if tokenizer.eos_token_id is not None else "")
    try:
        family = template_of_jinja(text)
    except CheckpointError:
        family = None
    is_opened_so = family is not None and (not file.bos or file.has_bos == family.has_bos)
    if family is not None and is_opened_so and _is_spelled_so(family, tokenizer) and file.agrees(family, _all()):
        return family
    try:
        own = _read_off(file, tokenizer)
    except (CheckpointError, PromptError) as error:
        if family is None:
            raise CheckpointError(f"the checkpoint's chat template cannot be followed: {error}; name a template of ours") from error
        _LOG.warning("the checkpoint's chat template cannot be followed (%s); taking %s, see llava lint", error, family.name)
        return family
    return own


@dataclass(frozen=True, slots=True)
class _File:
    """A chat template file, and what it makes of conversations."""

    text: str
    bos: str
    eos: str

    @property
    def has_bos(self) -> bool:
        """Whether its prompts begin with bos, or would where there is none."""
        return not self.bos or self._written(_talk(1), add_generation_prompt=True).startswith(self.bos)

    def rendered(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
        """Return the text without the opening bos. Raises: CheckpointError."""
        written = self._written(conversation, add_generation_prompt=add_generation_prompt)
        return written.removeprefix(self.bos) if self.bos else written

    def _written(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        return render_jinja(
            self.text, conversation, bos=self.bos, eos=self.eos, add_generation_prompt=add_generation_prompt, has_parts=False
        )

    def agrees(self, template: ChatTemplate, conversations: Sequence[Conversation]) -> bool:
        """Whether a template writes what this file writes, refusing what it refuses."""
        return all(self._made(conversation) == self._made_by(template, conversation) for conversation in conversations)

    def strips(self, template: ChatTemplate, role: Role, conversation: Conversation) -> bool:
        """Whether the outer white space of a role's message is gone in this file's text of a conversation."""
        turns = _turns_of(template)
        if role == "system" and turns.system is None:
            return False
        return self.agrees(replace(template, form=replace(turns, strips=(role,))), (conversation,))

    def _made(self, conversation: Conversation) -> str | None:
        try:
            return self.rendered(conversation, add_generation_prompt=conversation.messages[-1].role == "user")
        except CheckpointError:
            return None

    def _made_by(self, template: ChatTemplate, conversation: Conversation) -> str | None:
        asks = conversation.messages[-1].role == "user"
        try:
            return segments_text(template.segments(conversation, add_generation_prompt=asks), bos=self.bos, eos=self.eos)
        except PromptError:
            return None


def _read_off(file: _File, tokenizer: Tokenizer) -> ChatTemplate:
    """Read the markup off from where known words stand. Raises: CheckpointError where it is not that of turns."""
    head, after_question, after_answer, tail = _cut(file.rendered(_talk(3)), _FIRST, _ANSWER, _SECOND)
    user_end = _cut(file.rendered(_talk(1), add_generation_prompt=False), _FIRST)[1]
    end = _cut(file.rendered(_talk(2), add_generation_prompt=False), _FIRST, _ANSWER)[2]
    opening = _without_start(tail, user_end)
    turns = Turns(
        system=None,
        user=(head, user_end),
        opening=opening,
        lead=_without_start(after_question, user_end + opening),
        end=end,
    )
    next_user = _without_start(after_answer, end)
    found = _with_system(file, turns, head, next_user)
    turns = _turns_of(found)
    turns = replace(turns, tokens=_tokens_in(turns, tokenizer))
    turns = replace(turns, strips=tuple(role for role, talk in _SPACED if file.strips(found, role, talk)))
    end_segments = turns.cut(turns.end)
    ends = tuple(segment.text for segment in end_segments if segment.kind == "token")
    has_end = any(segment.kind != "text" for segment in end_segments) or not turns.end.strip()
    return replace(found, form=turns, has_bos=file.has_bos, end_tokens=ends[:1], stops=() if has_end else (turns.end.strip(),))


def _with_system(file: _File, turns: Turns, head: str, next_user: str) -> ChatTemplate:
    """Find the system text's place, and what stands there by default; a place that turns do not have counts as none."""
    forms = [replace(turns, user=(user, turns.user[1]), between=next_user.removesuffix(user)) for user in dict.fromkeys((head, next_user))]
    for template in (*_places(file, forms, head), *(ChatTemplate("own", None, form) for form in forms)):
        is_tried = _turns_of(template).system is not None
        if file.agrees(template, [talk for talk in _conversations() if is_tried or talk.messages[0].role != "system"]):
            return template
    raise CheckpointError("it does not put messages one after the other in the same way")


def _places(file: _File, forms: Sequence[Turns], head: str) -> Iterator[ChatTemplate]:
    """Yield the places that the system text may have: before the first user turn, or inside."""
    try:
        before, after = _cut(file.rendered(_talk(1, _SYSTEM)), _SYSTEM, _FIRST)[:2]
    except CheckpointError:
        return
    has_default = head.startswith(before) and head.endswith(after) and len(before) + len(after) <= len(head)
    default = head[len(before) : len(head) - len(after)] if has_default else None
    for form in forms:
        user = form.user[0]
        if after.endswith(user):
            outside = replace(form, system=(before, after.removesuffix(user)))
            yield ChatTemplate("own", None if user == head else default, outside)
        if before.startswith(user):
            yield ChatTemplate("own", None, replace(form, system=(before.removeprefix(user), after), is_system_inside=True))


def _turns_of(template: ChatTemplate) -> Turns:
    assert isinstance(template.form, Turns)
    return template.form


def _is_spelled_so(family: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a family's tokens are the tokenizer's, and all of its that stand in the markup."""
    if not isinstance(family.form, Turns):
        return False
    names, tokens = family.form.names(), _tokens_in(family.form, tokenizer)
    marks = {mark for mark in (_BOS, _EOS) if mark in "".join(family.form.markup)}
    return all(tokenizer.find_token(name) is not None for name in names) and marks <= {*tokens} <= {*names, *marks}


def _tokens_in(turns: Turns, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return what is a token in the markup: the marks of bos and eos where there are such, and all that was added to the tokenizer."""
    roles = ((_BOS, tokenizer.bos_token_id), (_EOS, tokenizer.eos_token_id))
    held = [name for mark, index in roles if index is not None for name in (mark, tokenizer.convert_ids_to_tokens(index))]
    known = dict.fromkeys((*held, *tokenizer.added_tokens))
    markup = "".join(turns.markup)
    return tuple(token for token in known if token in markup)


def _talk(num_messages: int, system: str | None = None) -> Conversation:
    start = () if system is None else (Message("system", (TextPart(system),)),)
    return Conversation((*start, *(Message(role, (TextPart(text),)) for role, text in _TALK[:num_messages])))


def _conversations() -> list[Conversation]:
    return [_talk(count, system) for system in (None, _SYSTEM) for count in range(1, len(_TALK) + 1)]


_SPACED: tuple[tuple[Role, Conversation], ...] = (
    ("system", _talk(1, f"\n {_SYSTEM} \n")),
    ("user", Conversation.ask(f"\n {_FIRST} \n")),
    ("assistant", Conversation.ask(_FIRST).reply(f"\n {_ANSWER} \n")),
)


def _all() -> list[Conversation]:
    return [*_conversations(), *(conversation for _, conversation in _SPACED)]


def _cut(text: str, *marks: str) -> list[str]:
    """Return what stands around the marks. Raises: CheckpointError where one is missing or out of its place."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise CheckpointError(f"it loses {mark!r}")
        parts.append(part)
    return [*parts, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise CheckpointError(f"it writes {text!r} where {start!r} should be")
    return text.removeprefix(start)
