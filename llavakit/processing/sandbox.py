"""Rendering a checkpoint's own chat template, to see what other programs make of a conversation.

Owns: render_jinja, in jinja2's immutable sandbox with transformers' settings. Refuses: range, multiplication and powers, by which a
template could grow without end; files, modules, anything that is not the conversation. Prompts are never made this way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llavakit.errors import CheckpointError
from llavakit.types import Conversation, ImagePart, Message

__all__ = ["render_jinja"]

_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_TEMPLATE_MISTAKES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox without the operators that make much of little."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> NoReturn:
        del context, left, right
        raise SecurityError(f"templates may not use {operator}")


def render_jinja(text: str, conversation: Conversation, *, bos: str, eos: str, add_generation_prompt: bool, has_parts: bool) -> str:
    """Render a template text; with has_parts the content of a message is a list of parts, otherwise its text.

    Raises: CheckpointError where the template cannot be rendered.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals = {"namespace": Namespace, "raise_exception": _raise_exception}
    environment.filters["tojson"] = str
    source = _GENERATION.sub(lambda match: f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}", text)
    messages = [_message(message, has_parts=has_parts) for message in conversation.messages]
    try:
        template = environment.from_string(source)
        return template.render(messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=add_generation_prompt)
    except _TEMPLATE_MISTAKES as error:
        raise CheckpointError(f"the checkpoint's chat template cannot be rendered: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _message(message: Message, *, has_parts: bool) -> Mapping[str, Any]:
    parts: Sequence[Mapping[str, str]] = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in message.parts
    ]
    return {"role": message.role, "content": parts if has_parts else message.text}
