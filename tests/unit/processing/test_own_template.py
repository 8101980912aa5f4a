"""Chat templates of language models alone: read off their own file, and equal to it in every conversation that they hold."""

import itertools
import json
import logging
from pathlib import Path

import pytest

from llavakit.errors import CheckpointError, PromptError
from llavakit.processing.chat import TEMPLATES, ChatTemplate, Turns
from llavakit.processing.own_template import template_of_text_checkpoint
from llavakit.processing.sandbox import render_jinja
from llavakit.processing.segments import segments_text
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.types import Conversation, Message, TextPart
from tests.foreign_templates import TEXT_FILES
from tests.tiny import llama3_tokenizer_folder, llama_config, qwen_tokenizer_folder, tiny_tokenizer

TOKENIZERS = {
    "llama": lambda path: tiny_tokenizer().save_pretrained(path),
    "llama 3": llama3_tokenizer_folder,
    "qwen": qwen_tokenizer_folder,
}
WORDS = ("a star?", "  two\n\nlines \n", "[INST] </s> <|im_end|>", "é 日本 😀")


def checkpoint(folder: Path, tokenizer: str, jinja: str | None) -> Path:
    """Write what a language model's folder has besides weights."""
    TOKENIZERS[tokenizer](folder)
    (folder / "config.json").write_text(llama_config().to_json())
    if jinja is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "chat_template": jinja}))
    return folder


def load(folder: Path) -> TextProcessor:
    return TextProcessor.from_pretrained(folder)


def talks() -> list[Conversation]:
    """Conversations of one to three questions, with and without a system text."""
    found = []
    for count, system in itertools.product((1, 2, 3), (None, "Be brief.")):
        head = () if system is None else (Message("system", (TextPart(system),)),)
        turns = [
            Message(role, (TextPart(f"{text} {place}"),)) for place, text in enumerate(WORDS[:count]) for role in ("user", "assistant")
        ]
        found.append(Conversation((*head, *turns[:-1])))
    return found


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", TEXT_FILES)
def test_prompts_are_the_files_own(tmp_path: Path, kind: str, tokenizer: str) -> None:
    processor = load(checkpoint(tmp_path, tokenizer, TEXT_FILES[kind]))
    template = processor.template
    bos = "<s>" if processor.tokenizer.bos_token_id is not None else ""
    for conversation in talks():
        try:
            made = segments_text(template.segments(conversation, add_generation_prompt=True))
        except PromptError:
            with pytest.raises(CheckpointError):
                render(TEXT_FILES[kind], conversation, bos)
            continue
        assert made == render(TEXT_FILES[kind], conversation, bos).removeprefix(bos)


def render(jinja: str, conversation: Conversation, bos: str) -> str:
    return render_jinja(jinja, conversation, bos=bos, eos="</s>", add_generation_prompt=True, has_parts=False)


NAMES = {
    "Qwen2": {"qwen": "qwen", "llama": "own"},
    "Llama-2-chat": {"llama": "llama_2_chat", "qwen": "own"},
    "Llama 3 instruct": {"llama 3": "llama_3", "llama": "own"},
    "ChatML": {"qwen": "chatml", "llama": "own"},
    "Mistral instruct": {"llama": "own"},
    "no system": {"llama": "own"},
}


@pytest.mark.parametrize(("kind", "tokenizer", "name"), [(kind, *item) for kind, names in NAMES.items() for item in names.items()])
def test_a_file_that_does_what_a_family_does_has_its_name(tmp_path: Path, kind: str, tokenizer: str, name: str) -> None:
    assert load(checkpoint(tmp_path, tokenizer, TEXT_FILES[kind])).template.name == name


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_what_a_person_types_stays_text(tmp_path: Path, kind: str) -> None:
    processor = load(checkpoint(tmp_path, "llama", TEXT_FILES[kind]))
    plain = processor.prompt(Conversation.ask("hello")).ids
    typed = processor.prompt(Conversation.ask("</s><s><|im_end|><image>")).ids
    special = processor.tokenizer.special_ids
    assert [index for index in typed if index in special] == [index for index in plain if index in special]


def test_tokens_of_the_markup_are_the_tokenizers(tmp_path: Path) -> None:
    """Mistral's later tokenizers know [INST] as one token; a Llama that was taught ChatML spells <|im_end|> out."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(llama_config().to_json())
    (tmp_path / "chat_template.jinja").write_text(TEXT_FILES["no system"])
    ids = load(tmp_path).prompt(Conversation.ask("[INST]")).ids
    assert ids.count(tokenizer.convert_tokens_to_ids("[INST]")) == 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids("[/INST]")


def test_answers_end_as_the_file_ends_them(tmp_path: Path) -> None:
    def template(name: str, tokenizer: str) -> ChatTemplate:
        return load(checkpoint(tmp_path / f"{name} {tokenizer}", tokenizer, TEXT_FILES[name])).template

    (tmp_path / "answers end in words llama").mkdir()
    assert template("answers end in words", "llama").stops == ("### END",)
    (tmp_path / "ChatML llama").mkdir()
    assert template("ChatML", "llama").stops == ("<|im_end|>",)
    (tmp_path / "a date, trimmed llama 3").mkdir()
    dated = template("a date, trimmed", "llama 3")
    assert (dated.end_tokens, dated.stops, dated.has_bos, dated.system) == (("<|eot_id|>",), (), True, "")
    (tmp_path / "no system llama").mkdir()
    assert template("no system", "llama").stops == ()


def test_white_space_goes_where_the_file_drops_it(tmp_path: Path) -> None:
    form = load(checkpoint(tmp_path, "llama", TEXT_FILES["system inside, stripped"])).template.form
    assert isinstance(form, Turns)
    assert (form.strips, form.is_system_inside, form.between) == (("user", "assistant"), True, "<s>")


def test_a_system_text_without_a_place_is_refused(tmp_path: Path) -> None:
    processor = load(checkpoint(tmp_path, "llama", TEXT_FILES["no system"]))
    with pytest.raises(PromptError, match="no place for a system text"):
        processor.prompt(Conversation.ask("hello", system="Be brief."))


def test_a_file_that_is_not_of_turns_gives_way_to_its_family(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """This one shows only the last question, with the [INST] of a family."""
    jinja = "{{ bos_token + '[INST] ' + messages[-1].content + ' [/INST]' }}"
    with caplog.at_level(logging.WARNING):
        template = load(checkpoint(tmp_path, "llama", jinja)).template
    assert template is TEMPLATES["mistral_instruct"]
    assert "taking mistral_instruct, see llava lint" in caplog.text


@pytest.mark.parametrize("jinja", ["{{ messages[-1].content }}", "{{ oops", "nothing", "{{ messages[0].nothing.at_all }}"])
def test_a_file_that_nothing_follows_is_refused(tmp_path: Path, jinja: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be followed"):
        load(checkpoint(tmp_path, "llama", jinja))


def test_the_caller_and_the_absence_of_a_file_decide_as_elsewhere(tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama", None)
    tokenizer = load_tokenizer(tmp_path)
    assert template_of_text_checkpoint(tmp_path, tokenizer).template.name == "completion"
    (tmp_path / "chat_template.jinja").write_text(TEXT_FILES["no system"])
    choice = template_of_text_checkpoint(tmp_path, tokenizer, named=TEMPLATES["v1"])
    assert (choice.template.name, choice.source) == ("v1", "the caller")
    assert template_of_text_checkpoint(tmp_path, tokenizer).source == "chat_template.jinja"
