"""Parity of chat templates with transformers: written ones with its jinja environment, those of language models with its ids."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from llavakit.processing.chat import TEMPLATES, Turns
from llavakit.processing.jinja import jinja_text
from llavakit.processing.own_template import template_of_text_checkpoint
from llavakit.processing.segments import segments_text
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.types import Conversation, ImagePart, Message, TextPart
from tests.foreign_templates import TEXT_FILES
from tests.tiny import llama3_tokenizer_folder, qwen_tokenizer_folder, tiny_tokenizer

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


# Qwen's tokenizer has no bos, which transformers refuses where a file names it.
CASES = [(kind, name) for kind in TEXT_FILES for name in ("llama", "llama 3", "qwen") if name != "qwen" or "bos" not in TEXT_FILES[kind]]


@pytest.mark.parametrize(("kind", "tokenizer"), CASES)
def test_language_models_are_asked_with_the_ids_of_transformers(tmp_path: Path, kind: str, tokenizer: str) -> None:
    if tokenizer == "llama":
        tiny_tokenizer().save_pretrained(tmp_path)
    else:
        (llama3_tokenizer_folder if tokenizer == "llama 3" else qwen_tokenizer_folder)(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEXT_FILES[kind])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours = LlamaTokenizerFast.from_pretrained(tmp_path)
    roles = {role: getattr(ours, role) for role in ("bos_token", "eos_token") if getattr(ours, role) is not None}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **roles)
    template = template_of_text_checkpoint(tmp_path, ours).template
    processor = TextProcessor(tokenizer=ours, template=template)
    conversation = Conversation.ask("a red star?").reply("yes, one.", TextPart(" and\n\ntwo? ")).reply("no", TextPart("why not"))
    turns = [{"role": message.role, "content": message.text} for message in conversation.messages]
    expected = theirs.apply_chat_template(turns, chat_template=TEXT_FILES[kind], add_generation_prompt=True, return_dict=False)
    assert list(processor.prompt(conversation).ids) == expected
