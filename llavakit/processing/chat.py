"""Chat templates: from a conversation to segments, and from segments to ids with their loss mask.

Owns: the templates v1, v1_hf and plain, and encode_segments, which builds ids and mask together, segment by segment.
Invariants: image slots come only from ImagePart, end tokens only from the template; whatever a person typed stays text.
Sources: LLaVA's conversation templates and tokenizer_image_token (ids equal for ordinary conversations); llava-hf's chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llavakit.errors import PromptError
from llavakit.types import Conversation, Message

__all__ = ["TEMPLATES", "ChatTemplate", "EncodedChat", "Segment", "encode_segments", "jinja_text"]

_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # the system prompt that LLaVA-1.5 was trained with


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt: text (encoded on its own), one picture, or the end token."""

    kind: Literal["text", "image", "eos"]
    text: str = ""
    is_supervised: bool = False


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a model was taught to see conversations."""

    name: str
    system: str | None
    """System text used where the conversation has none of its own."""
    render: Callable[[ChatTemplate, Conversation, bool], list[Segment]]

    def segments(self, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
        """Cut a conversation into segments; with add_generation_prompt the last message must be the user's.

        Raises: PromptError where the template cannot express the conversation.
        """
        if add_generation_prompt and conversation.messages[-1].role != "user":
            raise PromptError("the last message must be from the user for the model to answer it")
        return self.render(self, conversation, add_generation_prompt)


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Ids with the pictures' slots expanded, and for each whether a model learns to produce it."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


def encode_segments(
    segments: Sequence[Segment], encode: Callable[[str], Sequence[int]], *, bos_id: int, eos_id: int, image_id: int, slots: Sequence[int]
) -> EncodedChat:
    """Concatenate bos and the segments' ids; the i-th picture takes slots[i] positions."""
    ids, mask = [bos_id], [False]
    images = iter(slots)
    for segment in segments:
        match segment.kind:
            case "text":
                part = encode(segment.text)
            case "eos":
                part = (eos_id,)
            case "image":
                part = (image_id,) * next(images)
        ids += part
        mask += [segment.is_supervised] * len(part)
    return EncodedChat(tuple(ids), tuple(mask))


def _render_v1(template: ChatTemplate, conversation: Conversation, add_generation_prompt: bool) -> list[Segment]:
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


def _render_plain(template: ChatTemplate, conversation: Conversation, add_generation_prompt: bool) -> list[Segment]:
    messages = conversation.messages
    if len(messages) != 2 - add_generation_prompt or len(messages[0].images) != 1:
        raise PromptError(f"template {template.name!r} is one picture and its caption, got {len(messages)} messages; use v1 to talk")
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


def jinja_text(template: ChatTemplate) -> str:
    """Write a v1 template as the chat_template.jinja that transformers reads: same text, pictures first in their turn."""
    if template.render is not _render_v1:
        raise PromptError(f"template {template.name!r} has no chat form")
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
