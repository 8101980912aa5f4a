"""Ollama's Modelfile: filled in as Ollama fills it, each template writes what ours writes."""

import re
from dataclasses import replace

import pytest

from llavakit import Conversation
from llavakit.checkpoint.modelfile import modelfile
from llavakit.errors import ConfigError
from llavakit.processing.chat import TEMPLATES, ChatTemplate, Turns
from llavakit.processing.segments import segments_text
from llavakit.types import TextPart
from tests.tiny import tiny_tokenizer

TALKS = sorted(name for name, template in TEMPLATES.items() if template.holds_talks)
QUESTIONS = ("what is there?", "and above it?", "go on")


def parts_of(text: str) -> tuple[str, str | None]:
    """Read TEMPLATE and SYSTEM back."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    system = re.search(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert template is not None
    return template[1], None if system is None else system[1]


def filled(template: str, values: dict[str, str]) -> str:
    """Fill in a Go template of variables, conditions on them and raw strings, which is all that is written here."""
    template = re.sub(
        r"\{\{ if \.(\w+) \}\}(.*?)\{\{ end \}\}", lambda match: match[2] if values[match[1]] else "", template, flags=re.DOTALL
    )
    return re.sub(r"\{\{ (?:\.(\w+)|`([^`]*)`) \}\}", lambda match: values[match[1]] if match[1] else match[2], template)


def as_ollama(text: str, num_answers: int, system: str | None = None) -> str:
    """Fill in the template once a turn; the system text goes to the first one, and the last one has no response."""
    template, default = parts_of(text)
    system = default if system is None else system
    written = ""
    for turn in range(num_answers + 1):
        values = {"System": (system or "") if turn == 0 else "", "Prompt": QUESTIONS[turn]}
        written += filled(template, {**values, "Response": f"answer {turn}" if turn < num_answers else ""})
    return written


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("num_answers", [0, 1, 2])
def test_a_talk_is_written_as_we_write_it(name: str, num_answers: int) -> None:
    template = TEMPLATES[name]
    talk = Conversation.ask(QUESTIONS[0])
    for turn in range(num_answers):
        talk = talk.reply(f"answer {turn}", TextPart(QUESTIONS[turn + 1]))
    ours = segments_text(template.segments(talk, add_generation_prompt=True), bos="<s>", eos="</s>")
    assert as_ollama(modelfile(["a.gguf"], template, tiny_tokenizer()), num_answers) == ours


def test_files_and_stops_are_listed() -> None:
    text = modelfile(["model-f16.gguf", "mmproj-f16.gguf"], TEMPLATES["llava_v0"], tiny_tokenizer())
    assert text.startswith("FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "###"\n')


def test_without_a_talk_the_text_goes_in_as_it_is() -> None:
    for template in (None, TEMPLATES["completion"]):
        assert parts_of(modelfile(["a.gguf"], template, tiny_tokenizer())) == ("{{ .Prompt }}", None)


def test_a_line_break_may_end_an_answer() -> None:
    assert modelfile(["a.gguf"], TEMPLATES["plain"], tiny_tokenizer()).endswith('PARAMETER stop """\n"""\n')


def own(user: str, system: str | None = None) -> ChatTemplate:
    turns = Turns(system=("", " "), user=(user, ""), opening=" A:", end="</s>")
    return ChatTemplate("own", system, turns)


@pytest.mark.parametrize("mark", ["{{ .System }}", '"""', "{{"])
def test_markup_is_never_a_command(mark: str) -> None:
    text = modelfile(["a.gguf"], own(f"{mark} U: "), tiny_tokenizer())
    assert filled(parts_of(text)[0], {"System": "", "Prompt": "hi", "Response": ""}) == f"{mark} U: hi A:"


def test_a_system_text_that_ends_its_quotes_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot"):
        modelfile(["a.gguf"], replace(own("U: "), system='say """'), tiny_tokenizer())
