"""generation_config.json: read as far as it is understood, refused where it is wrong, and handed on."""

import json
from pathlib import Path
from typing import Any

import pytest

from llavakit.checkpoint.generation import GenerationDefaults, load_generation
from llavakit.errors import CheckpointError
from llavakit.pretrained.causal_lm import LlamaForCausalLM
from tests.tiny import llama


def write(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_an_absent_file_says_nothing(tmp_path: Path) -> None:
    assert load_generation(tmp_path) == GenerationDefaults()


def test_one_end_or_several(tmp_path: Path) -> None:
    assert load_generation(write(tmp_path, eos_token_id=2)).end_ids == (2,)
    assert load_generation(write(tmp_path, eos_token_id=[2, 7], temperature=1, do_sample=True, other=3)) == GenerationDefaults(
        end_ids=(2, 7), temperature=1, do_sample=True
    )


WRONG = [{"eos_token_id": "2"}, {"eos_token_id": ["a"]}, {"temperature": "hot"}, {"do_sample": 1}, {"top_k": True}]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_other_types_are_named(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(values))):
        load_generation(write(tmp_path, **values))


def test_saving_hands_on_what_the_source_said(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "first")
    write(tmp_path / "first", eos_token_id=[2, 7], top_p=0.9, _from_model_config=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "first")
    assert model.generation.end_ids == (2, 7)
    model.save_pretrained(tmp_path / "second")
    values = json.loads((tmp_path / "second" / "generation_config.json").read_text())
    assert (values["eos_token_id"], values["top_p"], values["bos_token_id"]) == ([2, 7], 0.9, 1)
