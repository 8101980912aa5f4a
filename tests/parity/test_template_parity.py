"""Parity of written chat templates with transformers' jinja environment."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llavakit.processing.chat import TEMPLATES, Turns
from llavakit.processing.jinja import jinja_text
from llavakit.processing.segments import segments_text
from llavakit.types import Conversation, ImagePart, Message, TextPart

PLACE = ImagePart(b"never opened")
TALKING = [name for name, template in TEMPLATES.items() if isinstance(template.form, Turns)]
SYSTEM = Message("system", (TextPart(" Be 'brief', \\n and {{ kind }}. "),))
PICTURE = Conversation((Message("user", (PLACE, TextPart(" it's a {% star %}?\n"))),))
LATE = Conversation((Message("user", (TextPart("what is "), PLACE)),))
SEVERAL = Conversation((Message("user", (PLACE, PLACE, TextPart("and "), TextPart("then "), PLACE, TextPart(" so?"))),))
CONVERSATIONS = {
    "picture": PICTURE,
    "late picture": LATE,
    "picture alone": Conversation((Message("user", (PLACE,)),)),
    "several": SEVERAL,
    "turns": PICTURE.reply(" yes\n", TextPart("and two?")).reply("", PLACE, PLACE, TextPart("</s>")),
    "answered": LATE.reply("a <image>", TextPart(" ")).reply("no "),
    "system": Conversation((SYSTEM, *SEVERAL.reply("fine", TextPart("why?")).messages)),
}


@pytest.mark.parametrize("name", TALKING)
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_written_templates_render_our_prompts(name: str, kind: str) -> None:
    template, conversation = TEMPLATES[name], CONVERSATIONS[kind]
    asks = conversation.messages[-1].role == "user"
    turns = [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in message.parts
            ],
        }
        for message in conversation.messages
    ]
    rendered, _ = render_jinja_template(
        conversations=[turns], chat_template=jinja_text(template), add_generation_prompt=asks, bos_token="<s>", eos_token="</s>"
    )
    assert rendered == [segments_text(template.segments(conversation, add_generation_prompt=asks))]


@pytest.mark.parametrize("name", TALKING)
def test_plain_strings_are_content_too(name: str) -> None:
    conversation = Conversation.ask(" hi ", system="be brief").reply("yes", TextPart("why?"))
    turns = [{"role": message.role, "content": message.text} for message in conversation.messages]
    rendered, _ = render_jinja_template(
        conversations=[turns], chat_template=jinja_text(TEMPLATES[name]), add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert rendered == [segments_text(TEMPLATES[name].segments(conversation, add_generation_prompt=True))]
