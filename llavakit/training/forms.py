"""The forms that rows come in, and what each says: turns of text and pictures, or a prompt and two answers to it.

Owns: Row, Pair, row_of, pair_of. Forms of rows: LLaVA's (conversations, image), messages with typed content (messages, images), and the
Cauldron's (texts, images). Forms of pairs: LLaVA's (conversations that end with a question), TRL's (prompt, or what both answers begin
with, as texts or messages) and RLHF-V's (question, also as JSON inside a field text), each with chosen and rejected.
Refuses: files, and the bytes of pictures.
As in LLaVA, the only picture of a turn comes first in it, and a conversation that the model opens loses that first turn; several pictures
of a turn keep their places, and the template says whether they may. Of typed content only the parts of type image are pictures: a text
that spells <image> stays text. Sources: llava/train/train.py (preprocess_multimodal), LLaVA-NeXT's, TRL's prepare_multimodal_messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llavakit.training.checks import FaultError
from llavakit.training.pictures import Picture
from llavakit.types import Conversation, ImagePart, Message, Part, Role, TextPart

__all__ = ["Pair", "Row", "Turn", "pair_of", "row_of"]

_MARKER = "<image>"
_LEADING = re.compile(r"(?:<image>\n?)*")
_SPEAKERS: Mapping[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says; None stands for the next picture of the row."""

    role: Role
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(part for part in self.parts if part is not None)

    @property
    def num_pictures(self) -> int:
        """Places for pictures."""
        return self.parts.count(None)


@dataclass(frozen=True, slots=True)
class Row:
    """Turns and their pictures, in the order of their places."""

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    id: str | int | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """What is there to learn."""
        return tuple(turn.text for turn in self.turns if turn.role == "assistant")

    def conversation(self, pictures: Sequence[bytes]) -> Conversation:
        """Build the conversation around its pictures. Raises: PromptError for turns in an order that is none."""
        images = iter(pictures)
        return Conversation(tuple(Message(turn.role, tuple(_part(part, images) for part in turn.parts)) for turn in self.turns))


@dataclass(frozen=True, slots=True)
class Pair:
    """Turns that end with a question, a better and a worse answer."""

    asked: Row
    chosen: str
    rejected: str


def row_of(value: Any) -> tuple[Row, bool]:
    """Read a row; also tells whether it began with an answer, which is left out. Raises: FaultError."""
    if not isinstance(value, dict):
        raise FaultError("form", f"it must be a table, got {value!r:.80}")
    row = _unchecked_row(value)
    begins_with_answer = bool(row.turns) and row.turns[0].role == "assistant"
    if begins_with_answer:
        row = replace(row, turns=row.turns[1:])
    if not row.answers:
        raise FaultError("no answer", "it has no answer to learn")
    if not all(answer.strip() for answer in row.answers):
        raise FaultError("empty answer", "an answer is empty, so that the model would learn to say nothing")
    return row, begins_with_answer


def pair_of(value: Any) -> Pair:
    """Read a pair. Raises: FaultError."""
    if isinstance(value, dict) and isinstance(value.get("text"), str) and "chosen" not in value:
        try:
            inner = json.loads(value["text"])
        except (ValueError, RecursionError) as error:
            raise FaultError("pair", f"its field text is no JSON: {error}") from error
        value = {**value, **inner} if isinstance(inner, dict) else inner
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        raise FaultError("pair", "needs chosen and rejected, and conversations, prompt or question before them")
    asked = _asked(value)
    if not asked.turns or asked.turns[-1].role != "user":
        raise FaultError("pair", "the prompt must end with a question of the user")
    return Pair(asked, _answer(value["chosen"]), _answer(value["rejected"]))


def _unchecked_row(value: Mapping[str, Any]) -> Row:
    pictures, name = _pictures(value), value.get("id")
    known = name if isinstance(name, str | int) else None
    if isinstance(value.get("messages"), list):
        return _of_messages(value["messages"], pictures, known)
    if isinstance(value.get("conversations"), list):
        turns = tuple(_turn(turn, has_pictures=bool(pictures)) for turn in value["conversations"])
    elif isinstance(value.get("texts"), list):
        return _with_marks(tuple(turn for exchange in value["texts"] for turn in _exchange(exchange, bool(pictures))), pictures, known)
    else:
        raise FaultError("form", 'it must be a table with a list "conversations" or "messages"')
    return Row(_checked(turns, pictures), pictures, known)


def _asked(value: Mapping[str, Any]) -> Row:
    """Read what is asked in a pair; pictures without a mark come first in the first question."""
    pictures, name = _pictures(value), value.get("id")
    known = name if isinstance(name, str | int) else None
    prompt = next((value[key] for key in ("prompt", "question") if value.get(key) is not None), None)
    shared = _shared(value)
    if isinstance(value.get("conversations"), list):
        asked = _with_marks(tuple(_turn(turn, has_pictures=bool(pictures)) for turn in value["conversations"]), pictures, known)
    elif isinstance(prompt, str):
        asked = _with_marks((*_system(value), Turn("user", _cut(prompt, has_pictures=bool(pictures)))), pictures, known)
    elif isinstance(prompt, list):
        asked = _of_messages(prompt, pictures, known)
    elif prompt is None and shared:
        return _of_messages(shared, pictures, known)
    else:
        raise FaultError("pair", "needs conversations, prompt or question")
    if shared and [(turn.role, turn.text) for turn in _of_messages(shared, (), None).turns] != [
        (turn.role, turn.text) for turn in asked.turns
    ]:
        raise FaultError("pair", "the answers hold other turns than the prompt; a pair is one prompt and two answers")
    return asked


def _shared(value: Mapping[str, Any]) -> list[Any]:
    """Return the turns that both answers begin with, where they are given as messages. Raises: FaultError where they differ."""
    heads = [one[:-1] if isinstance(one := value[key], list) else [] for key in ("chosen", "rejected")]
    if heads[0] != heads[1]:
        raise FaultError("pair", "chosen and rejected follow different prompts")
    return heads[0]


def _system(value: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Read a system text beside a prompt."""
    text = value.get("system")
    if text is not None and not isinstance(text, str):
        raise FaultError("turn", f"system must be a text, got {text!r:.80}")
    return (Turn("system", (text,)),) if text else ()


def _pictures(value: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Read which pictures a row names or holds."""
    named = next((value[key] for key in ("image", "images", "image_path") if value.get(key) is not None), None)
    listed = () if named is None else tuple(named) if isinstance(named, list) else (named,)
    if not all(isinstance(picture, str | bytes) for picture in listed):
        raise FaultError("picture name", f"pictures must be file names, one or a list of them, got {named!r:.80}")
    return listed


def _turn(value: Any, *, has_pictures: bool) -> Turn:
    """Read a turn of LLaVA's form."""
    speaker = value.get("from") if isinstance(value, dict) else None
    if not isinstance(speaker, str) or speaker not in _SPEAKERS or not isinstance(value.get("value"), str):
        raise FaultError("turn", f'turns need "from" (human or gpt) and "value" (text), got {value!r:.80}')
    role, text = _SPEAKERS[speaker], value["value"]
    return Turn(role, _cut(text, has_pictures=has_pictures) if role == "user" else (text,))


def _exchange(value: Any, has_pictures: bool) -> tuple[Turn, Turn]:
    """Read an exchange of the Cauldron's form."""
    if not isinstance(value, dict) or not isinstance(value.get("user"), str) or not isinstance(value.get("assistant"), str):
        raise FaultError("turn", f'texts need "user" and "assistant", got {value!r:.80}')
    return Turn("user", _cut(value["user"], has_pictures=has_pictures)), Turn("assistant", (value["assistant"],))


def _cut(text: str, *, has_pictures: bool) -> tuple[str | None, ...]:
    """Cut a question at its marks. One picture comes first; of several, those in front lose their line breaks, which templates add.

    In a row without pictures a mark inside of a text is text, as in LLaVA; one at an end is a mark whose picture is missing.
    """
    count = text.count(_MARKER)
    if count == 0 or (not has_pictures and not text.startswith(_MARKER) and not text.endswith(_MARKER)):
        return (text,)
    if count == 1:
        return (None, text.replace(_MARKER, "").strip())
    leading = _LEADING.match(text)
    assert leading is not None, "it may match nothing"
    front, *others = text[leading.end() :].split(_MARKER)
    parts = [*(None,) * leading.group().count(_MARKER), front, *(part for other in others for part in (None, other))]
    return tuple(part for part in parts if part != "") or ("",)


def _of_messages(messages: Sequence[Any], pictures: tuple[Picture, ...], name: str | int | None) -> Row:
    """Read messages; their parts may name pictures of their own, or say by index which of the row's they are."""
    turns: list[Turn] = []
    wanted: list[Any] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise FaultError("turn", f"messages need a role (user, assistant or system) and content, got {message!r:.80}")
        parts, found = _content(message.get("content"), is_question=role == "user", has_pictures=bool(pictures))
        turns.append(Turn(_ROLES[role], parts))
        wanted += found
    if all(picture is None for picture in wanted):
        return Row(_marked(turns, pictures), pictures, name)
    if not all(isinstance(picture, str | bytes) for picture in wanted):  # by index, all of them
        if not all(isinstance(place, int) for place in wanted) or sorted(wanted) != list(range(len(pictures))):
            raise FaultError("marks", f"its parts of type image must name each of its {len(pictures)} pictures once")
        wanted = [pictures[place] for place in wanted]
    elif pictures:
        raise FaultError("marks", f"its parts name pictures, and it has {len(pictures)} others")
    return Row(tuple(turns), tuple(wanted), name)


def _content(content: Any, *, is_question: bool, has_pictures: bool = False) -> tuple[tuple[str | None, ...], list[Any]]:
    """Read a message's content: its parts, and of each picture its name, its number among the row's, or None."""
    if isinstance(content, str):
        parts = _cut(content, has_pictures=has_pictures) if is_question else (content,)
        return parts, [None] * parts.count(None)
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise FaultError("turn", f"content must be a text or a list of parts, got {content!r:.80}")
    parts_so_far: list[str | None] = []
    pictures: list[Any] = []
    for part in content:
        match part.get("type"):
            case "text" if isinstance(part.get("text"), str):
                parts_so_far.append(part["text"])
            case "image":
                parts_so_far.append(None)
                pictures.append(next((part[key] for key in ("image", "path", "index") if part.get(key) is not None), None))
            case _:
                raise FaultError("turn", f"parts must be of type text, with a text, or of type image, got {part!r:.80}")
    if pictures and not is_question:
        raise FaultError("turn", "pictures belong to the user's messages")
    return tuple(parts_so_far) or ("",), pictures


def _with_marks(turns: Sequence[Turn], pictures: tuple[Picture, ...], name: str | int | None) -> Row:
    return Row(_marked(turns, pictures), pictures, name)


def _marked(turns: Sequence[Turn], pictures: Sequence[Picture]) -> tuple[Turn, ...]:
    """Put pictures of which no question has a mark first in the first one. Raises: FaultError where there are other marks."""
    place = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if place is not None and not any(turn.num_pictures for turn in turns):
        first = replace(turns[place], parts=(*(None,) * len(pictures), *turns[place].parts))
        turns = (*turns[:place], first, *turns[place + 1 :])
    return _checked(turns, pictures)


def _checked(turns: Sequence[Turn], pictures: Sequence[Picture]) -> tuple[Turn, ...]:
    if (num_marks := sum(turn.num_pictures for turn in turns)) != len(pictures):
        raise FaultError("marks", f"it has {num_marks} {_MARKER} marks but {len(pictures)} pictures")
    return tuple(turns)


def _answer(value: Any) -> str:
    """Return an answer given as text, as a turn or message, or as messages that end with it."""
    last = value[-1] if isinstance(value, list) and value else value
    if isinstance(last, str) and not isinstance(value, list):
        return last
    if isinstance(last, dict) and last.get("from") == "gpt" and isinstance(last.get("value"), str):
        return str(last["value"])
    if isinstance(last, dict) and last.get("role") == "assistant":
        return Turn("assistant", _content(last.get("content"), is_question=False)[0]).text
    raise FaultError("pair", f"an answer must be a text, or messages that end with the assistant's, got {value!r:.80}")


def _part(part: str | None, images: Any) -> Part:
    return ImagePart(next(images)) if part is None else TextPart(part)
