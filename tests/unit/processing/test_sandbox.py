"""The sandbox: templates render as in transformers, and cannot do anything else."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llavakit.errors import CheckpointError
from llavakit.processing.sandbox import render_jinja
from llavakit.types import Conversation, TextPart
from tests.foreign_templates import FILES

TALK = Conversation.ask("what?", b"").reply("a star", TextPart("sure?"))


def rendered(text: str, *, has_parts: bool = True) -> str:
    return render_jinja(text, TALK, bos="<s>", eos="</s>", add_generation_prompt=True, has_parts=has_parts)


@pytest.mark.parametrize("kind", FILES)
def test_files_render_as_in_transformers(kind: str) -> None:
    text, has_parts = FILES[kind].text, FILES[kind].is_vision
    picture, question = [{"type": "image"}], [{"type": "text", "text": "what?"}]
    contents = [picture + question, [{"type": "text", "text": "a star"}], [{"type": "text", "text": "sure?"}]]
    roles = ("user", "assistant", "user")
    turns = [
        {"role": role, "content": content if has_parts else content[-1]["text"]} for role, content in zip(roles, contents, strict=True)
    ]
    expected, _ = render_jinja_template(
        conversations=[turns], chat_template=text, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert rendered(text, has_parts=has_parts) == expected[0]


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% for i in range(99999) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'secret' %}",
        "{{ raise_exception('no system') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[9]['role'] }}",
        "{% if %}",
    ],
)
def test_mischief_and_mistakes_are_errors_of_the_checkpoint(text: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be rendered"):
        rendered(text)
