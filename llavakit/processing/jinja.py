"""Chat templates as files: writing chat_template.jinja, and recognising the family of one that came with a checkpoint.

Owns: jinja_text, template_of_jinja. Refuses: running a checkpoint's template; it is known by its markers and its system line.
Invariant: transformers renders a written file to the text of our segments. The opening bos is in neither: the tokenizer adds it.
"""

from __future__ import annotations

import itertools
import re

from llavakit.errors import CheckpointError, PromptError
from llavakit.processing.chat import TEMPLATES, ChatTemplate, Turns

__all__ = ["jinja_text", "template_of_jinja"]

_LINE_AFTER_END = re.compile(r"<\|im_end\|>(\n|['\"]\s*\+\s*['\"]\n)")
_SPACE_AFTER_ROLE = re.compile(r"message(\[['\"]role['\"]\]|\.role)\s*\+\s*['\"] ['\"]")

_TEXT_MACRO = (
    "{%- macro text_of(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_FIRST_MACRO = (
    "{%- macro content_of(message) -%}{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}{%- endif -%}"
    "{{ text_of(message) }}{%- endmacro -%}"
)
_PLACES_MACRO = (
    "{%- macro content_of(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- if images | length > 1 -%}{%- set ns = namespace(leads=true) -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>\\n' if ns.leads else '<image>' }}"
    "{%- else -%}{%- set ns.leads = false -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ '<image>\\n' if images else '' }}{{ text_of(message) }}{%- endif -%}{%- endif -%}{%- endmacro -%}"
)


def template_of_jinja(text: str) -> ChatTemplate:
    """Recognise the template that a checkpoint's chat template text means. Raises: CheckpointError for another family's."""
    text = text.replace("\\n", "\n").replace("\\'", "'")
    if "<|start_header_id|>" in text:
        return _by_system(text, "llava_llama_3", default="llama_3")
    if "<|im_start|>" in text:
        # llava-hf writes a space after the role only for weights that were trained with LLaVA-NeXT's form, which has line breaks.
        is_next = _LINE_AFTER_END.search(text) is not None or _SPACE_AFTER_ROLE.search(text) is not None
        bare = "chatml" if is_next else "chatml_direct_hf"
        return _by_system(text, "mpt", "chatml_direct", "qwen_2_5", "qwen", default=bare)
    if "[INST]" in text:
        is_llama = "bos_token" in text and "<<SYS>>" in text
        return _by_system(text, "llama_2", "llava_llama_2", default="llama_2_chat" if is_llama else "mistral_instruct")
    if "###" in text and "Human" in text:
        return TEMPLATES["v0" if "renewable and non-renewable" in text else "llava_v0"]
    if "ASSISTANT:" in text:
        return _by_system(text, "v1", "llava_v1", default="v1_hf")
    raise CheckpointError(
        "the checkpoint's chat template is of no known family (USER/ASSISTANT, ###, [INST], <|im_start|>, <|start_header_id|>); "
        f'put "llavakit_template" with one of {", ".join(TEMPLATES)} into processor_config.json'
    )


def _by_system(text: str, *names: str, default: str) -> ChatTemplate:
    """Return the first template whose system line begins in the text."""
    for name in names:
        system = TEMPLATES[name].system
        assert system is not None
        if system.partition(". ")[0] in text:
            return TEMPLATES[name]
    return TEMPLATES[default]


def jinja_text(template: ChatTemplate, image_marks: tuple[str, str] | None = None) -> str:
    """Write a template as the chat_template.jinja that transformers reads, image_marks around each <image>.

    Raises: PromptError for one that holds no conversations.
    """
    turns = template.form
    if not isinstance(turns, Turns):
        raise PromptError(f"template {template.name!r} has no chat form; use v1 to talk")
    trims = {role: " | trim" if role in turns.strips else "" for role in ("system", "user", "assistant")}
    default = "" if template.system is None else _literal(turns.trim("system", template.system))
    otherwise = f"{{%- else -%}}{{%- set system = {default} -%}}" if default else ""
    before, after = ("", "") if turns.system is None else turns.system
    show_system = f"{{%- if system is defined -%}}{_show(turns, before)}{{{{ system }}}}{_show(turns, after)}{{%- endif -%}}"
    between = f"{{%- if not is_first -%}}{_show(turns, turns.between)}{{%- endif -%}}" if turns.between else ""
    contents = _PLACES_MACRO if turns.keeps_places else _FIRST_MACRO
    if image_marks is not None:
        contents = contents.replace("<image>", _literal("<image>".join(image_marks))[1:-1])
    inside = f"{{%- if is_first -%}}{show_system}{{%- endif -%}}" if turns.is_system_inside else ""
    return (
        f"{_TEXT_MACRO}{contents}"
        "{%- if messages[0]['role'] == 'system' -%}"
        f"{{%- set system = text_of(messages[0]){trims['system']} -%}}{otherwise}{{%- endif -%}}"
        f"{'' if turns.is_system_inside else show_system}"
        "{%- for message in messages if message['role'] != 'system' -%}{%- set is_first = loop.first -%}"
        f"{{%- if message['role'] == 'user' -%}}{between}{_show(turns, turns.user[0])}{inside}"
        f"{{{{ content_of(message){trims['user']} }}}}{_show(turns, turns.user[1])}"
        f"{{%- else -%}}{_show(turns, turns.opening)}{{%- set answer = text_of(message){trims['assistant']} -%}}"
        f"{{{{ {_literal(turns.lead)} + answer if answer else '' }}}}{_show(turns, turns.end)}{{%- endif -%}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{_show(turns, turns.opening)}{{%- endif -%}}"
    )


def _show(turns: Turns, markup: str) -> str:
    """Write markup as jinja output."""
    roles = {"bos": "bos_token", "eos": "eos_token"}
    output = []
    for role, parts in itertools.groupby(turns.cut(markup), lambda part: roles.get(part.kind)):
        output.append(_literal("".join(part.text for part in parts)) if role is None else role)
    return "".join(f"{{{{ {value} }}}}" for value in output)


def _literal(text: str) -> str:
    """Write text as a jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
