"""Deviations: each known one is found by its name, and files that do as training did have none."""

import dataclasses

import pytest

from llavakit.processing.chat import TEMPLATES, Turns
from llavakit.processing.deviations import PromptCheck, preprocessing_deviations
from llavakit.processing.jinja import jinja_text, template_of_jinja
from llavakit.processing.template_choice import TemplateChoice, trained_template
from tests.foreign_templates import FILES

TALKING = [name for name, template in TEMPLATES.items() if isinstance(template.form, Turns)]
HF_CONFIG = {"model_type": "llava", "text_config": {}}
CROPS, PADS = {"do_center_crop": True}, {"do_pad": True}


def check(jinja: str, *, is_vision: bool = True) -> PromptCheck:
    ours = template_of_jinja(jinja)
    trained = trained_template(TemplateChoice(ours, "", jinja)) if is_vision else ours
    return PromptCheck(jinja=jinja, trained=trained, ours=ours, bos="<s>", eos="</s>", is_vision=is_vision)


def names(checked: PromptCheck) -> list[str]:
    return [deviation.name for deviation in checked.deviations()]


@pytest.mark.parametrize("kind", FILES)
def test_files_of_others_deviate_by_name(kind: str) -> None:
    file = FILES[kind]
    assert names(check(file.text, is_vision=file.is_vision)) == list(file.deviations)


@pytest.mark.parametrize("name", TALKING)
@pytest.mark.parametrize("is_vision", [True, False])
def test_our_files_deviate_in_nothing(name: str, is_vision: bool) -> None:
    template = TEMPLATES[name]
    checked = PromptCheck(jinja=jinja_text(template), trained=template, ours=template, bos="<s>", eos="</s>", is_vision=is_vision)
    assert checked.deviations() == []


def test_a_deviation_says_what_file_training_and_we_do() -> None:
    found = {deviation.name: deviation for deviation in check(FILES["newline form"].text).deviations()}
    newline = found["newline-before-assistant"]
    assert (newline.file, newline.training) == (repr("\nASSISTANT: "), repr(" ASSISTANT: "))
    assert newline.ours == "as in training (template v1_hf)"
    assert found["missing-system-line"].ours == "no system line, as the file"


def test_a_system_line_of_ones_own_is_another_line() -> None:
    jinja = jinja_text(TEMPLATES["v1"]).replace("a curious user", "a patient user")
    checked = dataclasses.replace(check(jinja_text(TEMPLATES["v1"])), jinja=jinja)
    assert names(checked) == ["other-system-line"]


@pytest.mark.parametrize("jinja", ["{{ nothing.at.all }} ASSISTANT:", "USER: ASSISTANT:", "{% for"])
def test_templates_that_cannot_be_compared_are_said_to_be_so(jinja: str) -> None:
    assert names(dataclasses.replace(check(jinja_text(TEMPLATES["v1"])), jinja=jinja)) == ["unreadable-template"]


def test_cropping_deviates_from_llava_1_5() -> None:
    found = preprocessing_deviations(HF_CONFIG, CROPS, TEMPLATES["v1"])
    assert [deviation.name for deviation in found] == ["centre-crop"]
    assert preprocessing_deviations(HF_CONFIG, PADS, TEMPLATES["v1"]) == []
    assert preprocessing_deviations({"model_type": "llava_next", "text_config": {}}, CROPS, TEMPLATES["v1"]) == []
    assert preprocessing_deviations(HF_CONFIG, CROPS, TEMPLATES["mistral_instruct"]) == []


def test_the_config_knows_how_pictures_were_made_square() -> None:
    assert len(preprocessing_deviations({"image_aspect_ratio": "pad"}, CROPS, TEMPLATES["mpt"])) == 1
    assert preprocessing_deviations({**HF_CONFIG, "image_aspect_ratio": "square"}, CROPS, TEMPLATES["v1"]) == []
