"""llava lint: the report on stdout, the deviations by name, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavakit.cli.main import run
from llavakit.processing.chat import TEMPLATES
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.foreign_templates import FILES
from tests.tiny import llama_config, llava_config, tiny_processor, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save what a checkpoint has besides its weights."""
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(llava_config().to_json())
    return tmp_path


@pytest.fixture
def lint(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def command(*arguments: str) -> dict[str, Any]:
        assert run(["lint", *arguments, "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert isinstance(values, dict)
        return values

    return command


def make_foreign(folder: Path, jinja: str) -> None:
    """Give a folder the files that llava-hf writes: another template, no key of ours, the middle square."""
    for name, key in (("processor_config.json", "llavakit_template"), ("preprocessor_config.json", "do_pad")):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({entry: value for entry, value in values.items() if entry != key}))
    (folder / "chat_template.jinja").write_text(jinja)


def test_segments_and_ids_are_those_of_the_prompt(folder: Path, lint: Callable[..., dict[str, Any]]) -> None:
    values = lint(str(folder), "--prompt", "a star?")
    assert values["prompt"] == f"{TEMPLATES['v1'].system} USER: <image>\na star? ASSISTANT:"
    text, picture, rest = values["segments"]
    assert values["image slots"] == [[picture["start"], picture["start"] + 16]]
    assert text["ids"] == tiny_tokenizer().encode_text(text["text"])
    around = [[text["start"] + text["length"] - 1, text["ids"][-1]], [rest["start"], rest["ids"][0]]]
    assert text["pieces"][-1] == rest["pieces"][0] == "▁"
    assert all(place in values["lone spaces"] for place in around)
    assert values["tokens"] == 1 + text["length"] + 16 + rest["length"]
    assert (values["opening"], values["answers end at"], values["deviations"]) == (["<s>"], ["</s>"], [])


def test_llava_hfs_deviations_are_named(folder: Path, lint: Callable[..., dict[str, Any]]) -> None:
    make_foreign(folder, FILES["llava-hf 1.5"].text)
    values = lint(str(folder))
    assert (values["template"], values["decided by"], values["trained with"]) == ("v1_hf", "chat_template.jinja", "v1")
    expected = [*FILES["llava-hf 1.5"].deviations, "centre-crop"]
    assert [deviation["name"] for deviation in values["deviations"]] == expected
    assert all(set(deviation) == {"name", "file", "training", "ours"} for deviation in values["deviations"])


def test_a_template_may_be_named_where_none_is_recognised(folder: Path, lint: Callable[..., dict[str, Any]]) -> None:
    make_foreign(folder, "{% for message in messages %}{{ message['content'] }}{% endfor %}Answer:")
    assert run(["lint", str(folder)]) == 3
    values = lint(str(folder), "--template", "vicuna_v1")
    assert (values["template"], values["decided by"], values["trained with"]) == ("v1", "the caller", "v1")
    assert [deviation["name"] for deviation in values["deviations"]] == ["unreadable-template", "centre-crop"]


def test_naming_a_template_does_not_change_the_training(folder: Path, lint: Callable[..., dict[str, Any]]) -> None:
    make_foreign(folder, FILES["llava-hf 1.5"].text)
    values = lint(str(folder), "--template", "v0")
    assert (values["template"], values["trained with"]) == ("v0", "v1")
    assert [item["name"] for item in values["deviations"]] == [*FILES["llava-hf 1.5"].deviations, "centre-crop"]


def test_a_language_models_file_is_what_it_is_asked_with(
    tmp_path: Path, lint: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(llama_config().to_json())
    (tmp_path / "chat_template.jinja").write_text(FILES["Mistral instruct"].text)
    values = lint(str(tmp_path))
    assert (values["template"], values["decided by"], values["deviations"]) == ("own", "chat_template.jinja", [])
    named = lint(str(tmp_path), "--template", "mistral_instruct")["deviations"]
    assert [(item["name"], item["training"]) for item in named] == [(name, "unknown") for name in FILES["Mistral instruct"].deviations]
    assert run(["lint", str(tmp_path), "--template", "mistral_instruct"]) == 0
    assert "2 deviations of the checkpoint's files from our prompt" in capsys.readouterr().out


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert run(["lint", str(tmp_path)]) == 3


def test_a_language_model_is_shown_without_pictures(tmp_path: Path, lint: Callable[..., dict[str, Any]]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(llama_config().to_json())
    values = lint(str(tmp_path), "--prompt", "a star")
    assert (values["template"], values["prompt"], values["image slots"]) == ("completion", "a star", [])
    assert values["trained with"] == "unknown (a language model alone)"
    assert lint(str(tmp_path), "--template", "llama_2_chat", "--prompt", "hi")["prompt"] == "[INST] hi [/INST]"


def test_the_report_is_on_stdout(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_foreign(folder, FILES["newline form"].text)
    image = tmp_path / "picture.png"
    image.write_bytes(to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 30, 20)))
    assert run(["lint", str(folder), "--image", str(image)]) == 0
    output = capsys.readouterr()
    assert "5 deviations of the checkpoint's files" in output.out
    assert "\n  newline-before-assistant\n" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--template", "v9"), 2), (("--template", "qwen"), 3), (("--template", "completion"), 4), (("--image", "no.png"), 4)],
)
def test_exit_codes(folder: Path, arguments: tuple[str, ...], code: int) -> None:
    assert run(["lint", str(folder), *arguments]) == code


def test_a_language_model_takes_no_picture(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(llama_config().to_json())
    assert run(["lint", str(tmp_path), "--image", "x.png"]) == 4
