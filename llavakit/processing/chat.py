"""Chat templates: from a conversation to segments, and from segments to ids with their loss mask.

Owns: the templates v1, v1_hf and plain, their choice by a checkpoint's own template text, and encode_segments, which builds ids
and mask together, segment by segment.
Invariants: image slots come only from ImagePart, end tokens only from the template; whatever a person typed stays text.
Sources: LLaVA's conversation templates and tokenizer_image_token (ids equal for ordinary conversations).
Deviation: v1_hf is llava-hf's prompt (no system line), but answers of the history end with the end token, as the weights were
trained, where llava-hf's file puts a space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llavakit.errors import CheckpointError, PromptError
from llavakit.types import Conversation, Message

__all__ = ["TEMPLATES", "ChatTemplate", "EncodedChat", "Segment", "encode_segments", "jinja_text", "template_of_jinja"]

_V1_OPENING = "A chat between a curious user and an artificial intelligence assistant. "
_V1_SYSTEM = f"{_V1_OPENING}The assistant gives helpful, detailed, and polite answers to the user's questions."
"""The system line that LLaVA-1.5 was trained with."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt: text (encoded on its own), one picture, or the end token."""

    kind: Literal["text", "image", "eos"]
    text: str = ""
    is_supervised: bool = False


class _Render(Protocol):
    def __call__(self, template: ChatTemplate, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]: ...


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a model was taught to see conversations."""

    name: str
    system: str | None
    """System text used where the conversation has none of its own."""
    render: _Render

    def segments(self, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
        """Cut a conversation into segments; with add_generation_prompt the last message must be the user's.

        Raises: PromptError where the template cannot express the conversation.
        """
        if add_generation_prompt and conversation.messages[-1].role != "user":
            raise PromptError("the last message must be from the user for the model to answer it")
        return self.render(self, conversation, add_generation_prompt=add_generation_prompt)


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Ids with the pictures' slots expanded, and for each whether a model learns to produce it."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


def encode_segments(
    segments: Sequence[Segment],
    encode: Callable[[str], Sequence[int]],
    *,
    bos_id: int | None,
    eos_id: int | None,
    image_id: int,
    slots: Sequence[int],
) -> EncodedChat:
    """Concatenate bos, where there is one, and the segments' ids; the i-th picture takes slots[i] positions.

    Raises: PromptError when an end token is needed and there is none.
    """
    ids = [] if bos_id is None else [bos_id]
    mask = [False] * len(ids)
    lengths = iter(slots)
    part: Sequence[int]
    for segment in segments:
        match segment.kind:
            case "text":
                part = encode(segment.text)
            case "eos":
                if eos_id is None:
                    raise PromptError("the template ends answers with the end token, and the tokenizer has no eos token; name one")
                part = (eos_id,)
            case "image":
                part = (image_id,) * next(lengths)
        ids += part
        mask += [segment.is_supervised] * len(part)
    return EncodedChat(tuple(ids), tuple(mask))


def _render_v1(template: ChatTemplate, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
    messages = conversation.messages
    system = template.system
    if messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    segments: list[Segment] = []
    pending = "" if system is None else f"{system} "
    for message in messages:
        if message.role == "user":
            pending = _open_turn(segments, f"{pending}USER: ", message)
        else:
            # The answer is encoded on its own: sentencepiece's dummy space is the template's space after the colon.
            segments += (Segment("text", f"{pending} ASSISTANT:"), Segment("text", message.text, True), Segment("eos", "", True))
            pending = ""
    if pending:
        segments.append(Segment("text", f"{pending} ASSISTANT:" if add_generation_prompt else pending))
    return segments


def _open_turn(segments: list[Segment], pending: str, message: Message) -> str:
    """Put the turn's pictures first, each followed by a line break, and return the text that is not yet a segment."""
    for _ in message.images:
        segments += (Segment("text", pending), Segment("image"))
        pending = "\n"
    return pending + message.text


def _render_plain(template: ChatTemplate, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
    messages = conversation.messages
    num_images = len(conversation.images)
    if len(messages) != (1 if add_generation_prompt else 2) or num_images != 1:
        got = f"{len(messages)} messages with {num_images} pictures"
        raise PromptError(f"template {template.name!r} is one picture and its caption, got {got}; use v1 to talk")
    caption = [] if add_generation_prompt else [Segment("text", f"{messages[1].text}\n", True)]
    return [Segment("image"), *caption]


TEMPLATES: Mapping[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("v1", _V1_SYSTEM, _render_v1),
        ChatTemplate("v1_hf", None, _render_v1),
        ChatTemplate("plain", None, _render_plain),
    )
}


def template_of_jinja(text: str) -> ChatTemplate:
    """Recognise the template that a checkpoint's chat template text means. Raises: CheckpointError for another family's."""
    if "ASSISTANT:" not in text:
        raise CheckpointError("the checkpoint's chat template is not of the USER/ASSISTANT kind of LLaVA-1.5; it is not supported")
    return TEMPLATES["v1" if _V1_OPENING in text else "v1_hf"]


def jinja_text(template: ChatTemplate) -> str:
    """Write a v1 template as the chat_template.jinja that transformers reads: same text, pictures first in their turn.

    Raises: PromptError for a template that holds no conversations.
    """
    if template.render is not _render_v1:
        raise PromptError(f"template {template.name!r} has no chat form; use v1 to talk")
    system = "" if template.system is None else template.system.replace("'", "\\'") + " "
    return (
        "{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}{{ messages[0]['content'] + ' ' }}"
        "{%- else -%}{%- for part in messages[0]['content'] -%}{{ part['text'] + ' ' }}{%- endfor -%}{%- endif -%}"
        f"{{%- else -%}}{{{{ '{system}' }}}}{{%- endif -%}}"
        "{%- for message in messages -%}{%- if message['role'] != 'system' -%}"
        "{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}"
        "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
        "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
        "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
        "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
    )
