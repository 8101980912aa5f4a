"""checkpoint.card: the card says what config, processor and source say, in front matter that the hub's own parser reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llavakit.checkpoint.card import (
    CardFacts,
    Licence,
    build_card,
    choose_licence,
    copy_licences,
    find_licences,
    find_origins,
    write_terms,
)
from llavakit.errors import ConfigError
from tests.tiny import llama_config, llava_config, tiny_processor

UNKNOWN = Licence()


def front_matter(card: str) -> dict[str, Any]:
    values: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    return values


def llava_facts(template: str = "v1", licence: Licence = UNKNOWN, base_model: str | None = None) -> CardFacts:
    return CardFacts(
        name="owner/tiny",
        config=llava_config(),
        class_name="LlavaLlamaForCausalLM",
        num_parameters=1234567,
        dtype="bfloat16",
        processor=tiny_processor(template),
        licence=licence,
        base_model=base_model,
    )


def test_front_matter_is_what_the_hub_reads() -> None:
    licence = Licence(license="other", license_name="a: strange 'name'", license_link="LICENSE.txt")
    assert front_matter(build_card(llava_facts(licence=licence, base_model="some/base"))) == {
        "license": "other",
        "license_name": "a: strange 'name'",
        "license_link": "LICENSE.txt",
        "base_model": "some/base",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llavakit"],
    }


def test_the_card_states_parts_prompt_preprocessing_and_terms() -> None:
    text = build_card(llava_facts())
    for told in (
        "# tiny\n",
        "1,234,567 parameters in bfloat16",
        "Llama, 2 layers, width 64, 4 heads over 2, vocabulary 384, context 256",
        "clip_vision_model, 3 layers (hidden state -2 is used), width 32, 28 pixels in patches of 7",
        "Projector: mlp2x_gelu",
        "answers to the user's questions. USER: <image>\nWhat is in this picture? ASSISTANT:\n```",
        '"shortest_edge": 28',
        'LLM("owner/tiny")',
        "Not stated: ask the owner",
    ):
        assert told in text
    assert "license" not in front_matter(text)


@pytest.mark.parametrize("template", ["v1_hf", "plain"])
def test_other_templates_have_a_card(template: str) -> None:
    assert f"Template `{template}`" in build_card(llava_facts(template))


def test_language_models_have_a_card_without_pictures() -> None:
    facts = CardFacts(name="o/n", config=llama_config(), class_name="LlamaForCausalLM", num_parameters=1, dtype="float32")
    text = build_card(facts)
    assert "picture" not in text
    assert 'LlamaForCausalLM.from_pretrained("o/n")' in text
    assert front_matter(text)["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Licence()),
        ({"README.md": "---\nlicense: mit\n---\nText"}, Licence(license="mit")),
        ({"README.md": '---\ntags: [a]\nlicense: "mit"\n---\nlicense: gpl'}, Licence(license="mit")),
        ({"README.md": "license: mit\n"}, Licence()),
        ({"README.md": "---\nlicense: mit\n"}, Licence()),
        ({"README.md": "---\nlicense:\n- mit\n---\n"}, Licence()),
        ({"LICENSE.txt": "x", "NOTICE": "y"}, Licence(license="other", license_name="license", license_link="LICENSE.txt")),
        ({"NOTICE": "y"}, Licence()),
    ],
)
def test_the_sources_licence_is_found(tmp_path: Path, files: dict[str, str], expected: Licence) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert choose_licence(None, tmp_path) == expected
    assert choose_licence("apache-2.0", tmp_path) == Licence(license="apache-2.0")


def test_no_source_and_impossible_ids(tmp_path: Path) -> None:
    assert choose_licence(None, None) == choose_licence(None, tmp_path / "gone") == Licence()
    with pytest.raises(ConfigError, match="got 'two words'"):
        choose_licence("two words", None)


def test_which_files_are_licences(tmp_path: Path) -> None:
    yes = {"LICENSE", "LICENSE.txt", "license.md", "LICENCE", "NOTICE", "Notice.txt", "USE_POLICY.md", "USE-POLICY", "COPYING"}
    for name in (*yes, "config.json", "README.md", "licensed_words.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "LICENSES").mkdir()
    assert {path.name for path in find_licences(tmp_path)} == yes


def test_links_that_lead_elsewhere_are_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (source / "NOTICE").symlink_to(tmp_path / "secret")
    (source / "LICENSE").write_text("terms", encoding="utf-8")
    copy_licences(source, out)
    assert [path.name for path in out.iterdir()] == ["LICENSE"]
    assert "left out a licence file: NOTICE leads outside" in caplog.text


def test_what_a_model_was_made_of_is_told_and_its_terms_come_along(tmp_path: Path) -> None:
    hub = tmp_path / "models--some--tower" / "snapshots" / "0123abc"
    for folder, licence in ((tmp_path / "words", "terms of words"), (hub, "terms of the tower"), (tmp_path / "same", "terms of words")):
        folder.mkdir(parents=True)
        (folder / "LICENSE.txt").write_text(licence)
    (hub / "README.md").write_text("---\nlicense: mit\n---\n")
    origins = find_origins([tmp_path / "words", hub, tmp_path / "words", tmp_path / "same"])
    assert [origin.name for origin in origins] == ["words", "some/tower", "same"]
    out = tmp_path / "out"
    out.mkdir()
    write_terms(out, replace(llava_facts(), layout="gguf", origins=origins))
    text = (out / "README.md").read_text()
    assert "as GGUF files for llama.cpp and Ollama" in text
    assert "- words: [LICENSE.txt](LICENSE.txt)\n- some/tower: mit\n- same:" in text.replace(
        "[license](LICENSE.txt)", "[LICENSE.txt](LICENSE.txt)"
    )
    assert front_matter(text)["library_name"] == "gguf"
    assert {path.name: path.read_text() for path in out.glob("LICENSE*")} == {
        "LICENSE.txt": "terms of words",
        "LICENSE-2.txt": "terms of the tower",
    }
