"""Chat templates: how each family of checkpoints was taught to see conversations.

Owns: ChatTemplate, the table TEMPLATES, and rendering a conversation into segments.
Invariants: pictures come only from ImagePart, special tokens only from a template's own markup; whatever a person typed stays text.
Sources: llava/conversation.py of LLaVA and LLaVA-NeXT (fixed strings, exactly), get_prompt and tokenizer_image_token (ids equal).
Deviations: several pictures of a turn each keep a place, where LLaVA's training made them one; text beside a picture keeps its outer
white space; an empty answer still gets its terminator; llama_3 has one bos, as in training, where LLaVA-NeXT's demo sends two;
v0 is what LLaVA's own inference sends (its first training code wrote "### Human: ..." and a line break). Templates named *_hf and chatml,
llama_2_chat, llama_3 are their family's without a system line of their own, as in checkpoints whose own template has none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llavakit.errors import ConfigError, PromptError
from llavakit.processing.segments import ChatTokenizer, MarkerIds, Segment, find_marker
from llavakit.types import Conversation, ImagePart, Message, Role

__all__ = ["TEMPLATES", "ChatTemplate", "Turns", "find_template"]

_NAMED = re.compile(r"<\|\w+\|>")
_MARKERS = re.compile(rf"(<s>|</s>|{_NAMED.pattern})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The markup around messages. In it <s> and </s> are the tokenizer's bos and eos, and <|...|> is the token of that name."""

    system: tuple[str, str] | None
    """Before and after the system text; None where the form has no place for one."""
    user: tuple[str, str]
    """Before and after a user's message."""
    opening: str
    """What asks for an answer."""
    lead: str = ""
    """Between the opening and an answer that is there."""
    end: str
    """After an answer; learned up to its last token."""
    between: str = ""
    """Before each user turn but the first."""
    is_system_inside: bool = False
    """Whether the system text stands inside the first user turn."""
    keeps_places: bool = False
    """Whether several pictures of a turn stay where they are; otherwise they come first."""
    strips: tuple[Role, ...] = ()
    """Whose messages lose their outer white space."""
    tokens: tuple[str, ...] | None = None
    """What is a token in the markup, where that is not what <s>, </s> and <|...|> say."""

    @property
    def markup(self) -> tuple[str, ...]:
        """All markup."""
        return (*(self.system or ()), *self.user, self.opening, self.lead, self.end, self.between)

    def names(self) -> tuple[str, ...]:
        """Return the named tokens of the markup, each once."""
        segments = [segment for markup in self.markup for segment in self.cut(markup)]
        return tuple(dict.fromkeys(segment.text for segment in segments if segment.kind == "token"))

    def cut(self, markup: str) -> tuple[Segment, ...]:
        """Cut markup at its tokens."""
        return _cut_markup(markup, self.tokens)

    def trim(self, role: Role, text: str) -> str:
        """Return a message's text as this form shows it."""
        return text.strip() if role in self.strips else text


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a model was taught to see conversations."""

    name: str
    system: str | None
    """System text used where the conversation has none of its own."""
    form: Turns | Literal["caption", "text"]
    """Turns of a talk, one picture with its caption, or one text that the model continues."""
    has_bos: bool = True
    """Whether a prompt begins with bos, where the tokenizer has one."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens that end an answer, besides the tokenizer's eos."""
    stops: tuple[str, ...] = ()
    """Strings that end an answer."""

    @property
    def holds_talks(self) -> bool:
        """Whether it can express more than one exchange."""
        return isinstance(self.form, Turns)

    def segments(self, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
        """Cut a conversation into segments; with add_generation_prompt the last message must be the user's.

        Raises: PromptError where the template cannot express the conversation.
        """
        if add_generation_prompt and conversation.messages[-1].role != "user":
            raise PromptError("the last message must be from the user for the model to answer it")
        match self.form:
            case "caption":
                return _render_caption(self.name, conversation, add_generation_prompt=add_generation_prompt)
            case "text":
                return _render_text(self.name, conversation)
            case turns:
                return _render_turns(turns, self.system, conversation, add_generation_prompt=add_generation_prompt)

    def markers(self, tokenizer: ChatTokenizer, image_id: int) -> MarkerIds:
        """Look up the ids of this template's markers. Raises: CheckpointError naming a token that the tokenizer lacks."""
        names = dict.fromkeys((*(self.form.names() if isinstance(self.form, Turns) else ()), *self.end_tokens))
        tokens = {name: find_marker(tokenizer, name, self.name) for name in names}
        return MarkerIds(image_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokens, self.has_bos)

    def end_ids(self, markers: MarkerIds) -> frozenset[int]:
        """Return the ids that end an answer: the tokenizer's eos and this template's end tokens."""
        ends = frozenset(markers.tokens[token] for token in self.end_tokens)
        return ends if markers.eos is None else ends | {markers.eos}


def find_template(name: str) -> ChatTemplate:
    """Look up a template by our name or by LLaVA's. Raises: ConfigError listing the names."""
    template = TEMPLATES.get(_ALIASES.get(name, name))
    if template is None:
        raise ConfigError(f"there is no template {name!r}; known are {', '.join((*TEMPLATES, *_ALIASES))}")
    return template


@functools.cache
def _cut_markup(markup: str, tokens: tuple[str, ...] | None) -> tuple[Segment, ...]:
    marks = _MARKERS if tokens is None else re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")
    kinds: dict[str, Literal["bos", "eos"]] = {"<s>": "bos", "</s>": "eos"}
    if tokens == ():
        return (Segment("text", markup),) if markup else ()
    cut = [(part, bool(marks.fullmatch(part))) for part in marks.split(markup) if part]
    return tuple(
        Segment(kinds.get(part, "token"), "" if part in kinds else part) if is_mark else Segment("text", part) for part, is_mark in cut
    )


class _Writer:
    """Segments in the making; texts of the same supervision that follow each other become one."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def add(self, *segments: Segment) -> None:
        for segment in segments:
            last = self.segments[-1] if self.segments else None
            if segment.kind == "text" and last is not None and last.kind == "text" and last.is_supervised == segment.is_supervised:
                self.segments[-1] = replace(last, text=last.text + segment.text)
            elif segment.kind != "text" or segment.text:
                self.segments.append(segment)

    def add_content(self, content: Sequence[str | None]) -> None:
        for part in content:
            self.add(Segment("image") if part is None else Segment("text", part))

    def add_answer(self, turns: Turns, text: str) -> None:
        self.add(*turns.cut(turns.opening))
        if text:
            self.add(Segment("text", turns.lead + text, True))
        end = turns.cut(turns.end)
        last = max((place for place, segment in enumerate(end) if segment.kind != "text"), default=len(end))
        self.add(*(replace(segment, is_supervised=place <= last) for place, segment in enumerate(end)))


def _render_turns(turns: Turns, system: str | None, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
    writer, messages = _Writer(), conversation.messages
    if messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    opening = [] if system is None else _system_segments(turns, system)
    if not turns.is_system_inside:
        writer.add(*opening)
    for place, message in enumerate(messages):
        if message.role == "assistant":
            writer.add_answer(turns, turns.trim("assistant", message.text))
            continue
        writer.add(*turns.cut(turns.user[0] if place == 0 else turns.between + turns.user[0]))
        if place == 0 and turns.is_system_inside:
            writer.add(*opening)
        writer.add_content(_content(turns, message))
        writer.add(*turns.cut(turns.user[1]))
    if add_generation_prompt:
        writer.add(*turns.cut(turns.opening))
    return writer.segments


def _system_segments(turns: Turns, system: str) -> list[Segment]:
    if turns.system is None:
        raise PromptError("this model's chat template has no place for a system text; leave it out")
    before, after = turns.system
    return [*turns.cut(before), Segment("text", turns.trim("system", system)), *turns.cut(after)]


def _content(turns: Turns, message: Message) -> list[str | None]:
    """Put a user's texts and pictures (None) in the order of the training data; pictures that come first get a line break each."""
    content: list[str | None] = []
    if turns.keeps_places and len(message.images) > 1:
        is_leading = True
        for part in message.parts:
            is_leading = is_leading and isinstance(part, ImagePart)
            content += ((None, "\n") if is_leading else (None,)) if isinstance(part, ImagePart) else (part.text,)
    else:
        content += (None, "\n") * len(message.images)
        content.append(message.text)
    return _strip(content) if "user" in turns.strips else content


def _strip(content: list[str | None]) -> list[str | None]:
    """Strip the content as if it were one text in which each picture is a word."""
    words = list(content)
    while words and isinstance(words[0], str) and not words[0].lstrip():
        del words[0]
    while words and isinstance(words[-1], str) and not words[-1].rstrip():
        del words[-1]
    if words and isinstance(words[0], str):
        words[0] = words[0].lstrip()
    if words and isinstance(words[-1], str):
        words[-1] = words[-1].rstrip()
    return words


def _render_caption(name: str, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
    messages = conversation.messages
    num_images = len(conversation.images)
    if len(messages) != (1 if add_generation_prompt else 2) or num_images != 1:
        got = f"{len(messages)} messages with {num_images} pictures"
        raise PromptError(f"template {name!r} is one picture and its caption, got {got}; use v1 to talk")
    caption = [] if add_generation_prompt else [Segment("text", f"{messages[1].text}\n", True)]
    return [Segment("image"), *caption]


def _render_text(name: str, conversation: Conversation) -> list[Segment]:
    messages = conversation.messages
    if messages[0].role != "user" or len(messages) > 2 or conversation.images:
        got = f"{len(messages)} messages, the first from the {messages[0].role}, with {len(conversation.images)} pictures"
        raise PromptError(f"template {name!r} is one text that the model continues, got {got}; name a chat template to talk")
    writer = _Writer()
    writer.add(Segment("text", messages[0].text))
    if len(messages) == 2:
        writer.add(Segment("text", messages[1].text, True))
        writer.add(Segment("eos", "", True))
    return writer.segments


# The fixed strings of the families. Source: llava/conversation.py of LLaVA and LLaVA-NeXT.

_OPENING_USER = "A chat between a curious user and an artificial intelligence assistant. "
_OPENING_HUMAN = "A chat between a curious human and an artificial intelligence assistant. "
_MANNERS = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_USER_SYSTEM = _OPENING_USER + _MANNERS.format("user")
_HUMAN_SYSTEM = _OPENING_HUMAN + _MANNERS.format("human")
_SAFETY_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers "
    "should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
    "responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. If you don't know the answer to a question, please don't share false "
    "information."
)
_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and "
    "assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_V0_EXAMPLE = (
    "Human: What are the key differences between renewable and non-renewable energy sources?###Assistant: Renewable energy sources "
    "are those that can be replenished naturally in a relatively short amount of time, such as solar, wind, hydro, geothermal, and "
    "biomass. Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, and "
    "natural gas. Here are some key differences between renewable and non-renewable energy sources:\n1. Availability: Renewable energy "
    "sources are virtually inexhaustible, while non-renewable energy sources are finite and will eventually run out.\n2. Environmental "
    "impact: Renewable energy sources have a much lower environmental impact than non-renewable sources, which can lead to air and "
    "water pollution, greenhouse gas emissions, and other negative effects.\n3. Cost: Renewable energy sources can be more expensive "
    "to initially set up, but they typically have lower operational costs than non-renewable sources.\n4. Reliability: Renewable "
    "energy sources are often more reliable and can be used in more remote locations than non-renewable sources.\n5. Flexibility: "
    "Renewable energy sources are often more flexible and can be adapted to different situations and needs, while non-renewable "
    "sources are more rigid and inflexible.\n6. Sustainability: Renewable energy sources are more sustainable over the long term, "
    "while non-renewable sources are not, and their depletion can lead to economic and social instability.\n###"
)

_V1 = Turns(system=("", " "), user=("USER: ", ""), opening=" ASSISTANT:", lead=" ", end="</s>")
_V0 = Turns(system=("", "###"), user=("Human: ", "###"), opening="Assistant:", lead=" ", end="###")
_LLAMA_2 = Turns(
    system=("<<SYS>>\n", "\n<</SYS>>\n\n"), user=("[INST] ", " [/INST]"), opening="", lead=" ", end=" </s>", between="<s>",
    is_system_inside=True,
)  # fmt: skip
_MPT = Turns(
    system=("<|im_start|>system\n", "<|im_end|>"),
    user=("<|im_start|>user\n", "<|im_end|>"),
    opening="<|im_start|>assistant\n",
    end="<|im_end|>",
)
_QWEN = Turns(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    opening="<|im_start|>assistant\n",
    end="<|im_end|>\n",
    keeps_places=True,
)
_LLAMA_3 = Turns(
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    keeps_places=True,
    strips=("system", "user", "assistant"),
)


def _chatml(name: str, system: str | None, turns: Turns) -> ChatTemplate:
    return ChatTemplate(name, system, turns, has_bos=False, end_tokens=("<|im_end|>",))


TEMPLATES: Mapping[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("v1", _USER_SYSTEM, _V1),
        ChatTemplate("v1_hf", None, _V1),
        ChatTemplate("llava_v1", _HUMAN_SYSTEM, _V1),
        ChatTemplate("v0", _HUMAN_SYSTEM, replace(_V0, system=("", f"###{_V0_EXAMPLE}")), stops=("###",)),
        ChatTemplate("llava_v0", _HUMAN_SYSTEM, _V0, stops=("###",)),
        ChatTemplate("llama_2", _SAFETY_SYSTEM, _LLAMA_2),
        ChatTemplate("llama_2_chat", None, _LLAMA_2),
        ChatTemplate("llava_llama_2", _VISION_SYSTEM, _LLAMA_2),
        ChatTemplate("mistral_instruct", None, replace(_LLAMA_2, between="")),
        _chatml("mpt", _MPT_SYSTEM, _MPT),
        _chatml("chatml_direct", "Answer the questions.", _MPT),
        _chatml("chatml_direct_hf", None, _MPT),
        _chatml("qwen", "You are a helpful assistant.", _QWEN),
        _chatml("qwen_2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", _QWEN),
        _chatml("chatml", None, _QWEN),
        ChatTemplate("llava_llama_3", _VISION_SYSTEM, _LLAMA_3, end_tokens=("<|eot_id|>",)),
        ChatTemplate("llama_3", None, _LLAMA_3, end_tokens=("<|eot_id|>",)),
        ChatTemplate("plain", None, "caption", stops=("\n",)),
        ChatTemplate("completion", None, "text"),
    )
}
_ALIASES = {"vicuna_v1": "v1", "qwen_1_5": "qwen", "llava_mistral_instruct": "mistral_instruct"}
