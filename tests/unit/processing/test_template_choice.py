"""The choice of a template: our key, the folder's own text, the config; each family by its content."""

import json
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import CheckpointError
from llavakit.processing.chat import TEMPLATES
from llavakit.processing.jinja import jinja_text
from llavakit.processing.template_choice import TemplateChoice, template_of_checkpoint, template_of_config, trained_template

ORIGINAL = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu", "vocab_size": 32000}


def hf(kind: str, **text: Any) -> dict[str, Any]:
    return {"model_type": kind, "text_config": text, "vision_config": {}}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaVA-1.5": ("v1", {**ORIGINAL, "model_type": "llava", "max_position_embeddings": 4096}),
    "LLaVA-1.6 mistral": ("mistral_instruct", {**ORIGINAL, "model_type": "llava_mistral"}),
    "LLaVA-1.6 34b": ("chatml_direct", {**ORIGINAL, "model_type": "llava_llama", "vocab_size": 64000}),
    "LLaVA-MPT": ("mpt", {**ORIGINAL, "model_type": "llava_mpt", "vocab_size": 50282}),
    "LLaVA-NeXT llama 3": ("llava_llama_3", {**ORIGINAL, "model_type": "llava_llama", "vocab_size": 128256}),
    "LLaVA-NeXT qwen": ("qwen", {**ORIGINAL, "model_type": "llava_qwen", "vocab_size": 151936}),
    "LLaVA 1.1": ("v1", {"mm_vision_tower": "x", "model_type": "llava", "vocab_size": 32003, "max_position_embeddings": 2048}),
    "LLaVA-Llama-2": ("llava_llama_2", {"mm_vision_tower": "x", "model_type": "llava", "max_position_embeddings": 4096}),
    "llava-hf 1.5": ("v1", hf("llava", model_type="llama", vocab_size=32064)),
    "llava-hf 1.5, defaults": ("v1", {"model_type": "llava", "text_config": {}}),
    "llava-hf 1.6 mistral": ("mistral_instruct", hf("llava_next", model_type="mistral", vocab_size=32064)),
    "llava-hf 1.6 34b": ("chatml_direct", hf("llava_next", model_type="llama", vocab_size=64064)),
    "llava-hf llama 3": ("llava_llama_3", hf("llava_next", model_type="llama", vocab_size=128320)),
    "llava-hf interleave": ("qwen", hf("llava", model_type="qwen2", vocab_size=152000)),
    "Llama": ("completion", {"model_type": "llama", "vocab_size": 32000}),
    "Mistral": ("completion", {"model_type": "mistral"}),
    "no config": ("v1", {}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_say_the_family(tmp_path: Path, kind: str) -> None:
    name, config = CONFIGS[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    choice = template_of_checkpoint(tmp_path)
    assert (choice.template.name, choice.source, choice.jinja) == (name, "config.json", None)


def test_the_first_llava_is_known_by_its_pad_token() -> None:
    config = {"mm_vision_tower": "x", "model_type": "llava", "vocab_size": 32001}
    assert template_of_config(config, {"[PAD]": 32000}).name == "llava_v0"
    assert template_of_config(config, {"<im_patch>": 32000}).name == "v1"


def test_a_llava_over_something_unknown_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a LLaVA over 'gemma'.*llavakit_template"):
        template_of_config(hf("llava_next", model_type="gemma"), {})


@pytest.mark.parametrize("place", ["chat_template.jinja", "processor_config.json", "chat_template.json", "tokenizer_config.json"])
def test_the_folders_own_text_comes_before_the_config(tmp_path: Path, place: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    text = jinja_text(TEMPLATES["llama_3"])
    (tmp_path / place).write_text(text if place.endswith("jinja") else json.dumps({"chat_template": text}))
    assert template_of_checkpoint(tmp_path) == TemplateChoice(TEMPLATES["llama_3"], place, text)


def test_our_key_comes_first(tmp_path: Path) -> None:
    text = jinja_text(TEMPLATES["llama_3"])
    (tmp_path / "chat_template.jinja").write_text(text)
    (tmp_path / "processor_config.json").write_text('{"llavakit_template": "mpt"}')
    assert template_of_checkpoint(tmp_path) == TemplateChoice(TEMPLATES["mpt"], "processor_config.json", text)
    (tmp_path / "processor_config.json").write_text('{"llavakit_template": "mpd"}')
    with pytest.raises(CheckpointError, match="'mpd'; known are v1"):
        template_of_checkpoint(tmp_path)


def test_of_named_texts_the_default_counts(tmp_path: Path) -> None:
    entries = [{"name": "tools", "template": "?"}, {"name": "default", "template": jinja_text(TEMPLATES["qwen"])}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    assert template_of_checkpoint(tmp_path).template.name == "qwen"


def test_names_of_folders_mean_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "llava-v1.6-mistral-7b"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert template_of_checkpoint(folder).template.name == "completion"


@pytest.mark.parametrize(("name", "trained"), [("v1_hf", "v1"), ("chatml", "qwen"), ("llama_3", "llava_llama_3"), ("mpt", "mpt")])
def test_what_llavas_were_trained_with_has_a_system_line(name: str, trained: str) -> None:
    choice = TemplateChoice(TEMPLATES[name], "config.json", None)
    assert trained_template(choice).name == trained
