"""Template files: what is written is recognised, and the files of others are known by their markers."""

import pytest

from llavakit.errors import CheckpointError, PromptError
from llavakit.processing.chat import TEMPLATES, Turns
from llavakit.processing.jinja import jinja_text, template_of_jinja
from tests.foreign_templates import FILES

TALKING = [name for name, template in TEMPLATES.items() if isinstance(template.form, Turns)]


@pytest.mark.parametrize("name", TALKING)
def test_written_templates_are_recognised(name: str) -> None:
    assert template_of_jinja(jinja_text(TEMPLATES[name])) is TEMPLATES[name]


@pytest.mark.parametrize(("name", "text"), [(file.template, file.text) for file in FILES.values()], ids=list(FILES))
def test_files_of_others_are_recognised(name: str, text: str) -> None:
    assert template_of_jinja(text).name == name
    assert template_of_jinja(text.replace("\\n", "\n")).name == name


def test_unknown_families_are_refused_with_a_way_out() -> None:
    with pytest.raises(CheckpointError, match='"llavakit_template" with one of v1, v1_hf'):
        template_of_jinja("{{ '<start_of_turn>model' }}")


@pytest.mark.parametrize("name", ["plain", "completion"])
def test_what_holds_no_conversations_has_no_file(name: str) -> None:
    with pytest.raises(PromptError, match="no chat form"):
        jinja_text(TEMPLATES[name])
