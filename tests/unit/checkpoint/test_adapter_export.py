"""Adapters written as adapters: peft over transformers' LLaVA gives the weights that we merge, from whatever class they come."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit import LlamaForCausalLM, LlavaLlamaForCausalLM
from llavakit.checkpoint.convert import Conversion, convert
from llavakit.checkpoint.parts import Sources
from llavakit.errors import CheckpointError, ConfigError
from llavakit.storage.folder import read_manifest
from tests.folders import assert_same
from tests.original_folders import make_original, original_names
from tests.tiny import copy_weights, family_config, hf_family, hf_llama, tiny_processor, tiny_tokenizer
from tests.unit.checkpoint.test_bases import ADAPTERS, merged, trained

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, of its own making
FAMILIES: dict[str, Callable[[str], str]] = {
    "4.36": lambda path: path.replace("model.language_model.", "language_model.model.", 1).replace(
        "model.multi_modal_projector", "multi_modal_projector", 1
    ).replace("model.vision_tower.", "vision_tower.vision_model.", 1),
    "4.52": lambda path: path.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1),
    "5": lambda path: path,
    "5 fresh": lambda path: path.removeprefix("model.").replace("language_model.", "language_model.model.", 1),
}  # fmt: skip
"""How a module of transformers 5 was called in other versions."""
OPTIONS: dict[str, dict[str, Any]] = {
    **{kind: ADAPTERS[kind] for kind in ("plain", "rank-stabilised", "DoRA", "patterns", "embedding and head")},
    "a regex": {"r": 2, "lora_alpha": 2, "target_modules": r".*language_model\.layers\.1\.mlp\.(up|down)_proj"},
    "some layers": {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "fc1", "linear_2"], "layers_to_transform": [1], "layers_pattern": "layers",
    },
    "the projector": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "modules_to_save": ["multi_modal_projector"]},
}  # fmt: skip


def export(source: Path, destination: Path, **sources: Any) -> dict[str, Any]:
    convert(source, destination, Conversion(to="adapter", sources=Sources(**sources)))
    values: dict[str, Any] = json.loads((destination / "adapter_config.json").read_text())
    return values


@pytest.fixture
def oracle(tmp_path: Path) -> Any:
    """Return transformers' LLaVA; its folder is `base`."""
    config = family_config("1.5")
    theirs = hf_family(config)
    copy_weights(theirs, LlavaLlamaForCausalLM(config)).save_pretrained(tmp_path / "base", processor=tiny_processor())
    return theirs


def in_old_form(folder: Path, family: str) -> None:
    """Rename an adapter's modules as an older version did, and write the old file: a pickle, names with the adapter's."""
    named = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    prefix = "base_model.model."
    renamed = {prefix + FAMILIES[family](name.removeprefix(prefix)): weight for name, weight in named.items()}
    torch.save({name.replace("lora_A.", "lora_A.default."): weight for name, weight in renamed.items()}, folder / "adapter_model.bin")


@pytest.mark.parametrize("kind", OPTIONS)
def test_peft_makes_the_same_weights_of_the_new_folder(tmp_path: Path, oracle: Any, kind: str) -> None:
    fresh = copy.deepcopy(oracle)
    wrapped = trained(oracle, **OPTIONS[kind])
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = merged(wrapped)
    settings = export(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "base")
    assert_same(load_file(tmp_path / "new" / "adapter_model.safetensors"), load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert_same(merged(PeftModel.from_pretrained(fresh, tmp_path / "new")), expected)
    ours = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "new", base=tmp_path / "base")
    theirs = copy_weights(wrapped.base_model.model, LlavaLlamaForCausalLM(ours.config))
    assert_same(ours.state_dict(), theirs.state_dict())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_the_old_file(tmp_path: Path, oracle: Any, family: str) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "fc2", "linear_1"], "modules_to_save": ["linear_2"], "alpha_pattern": {"fc2": 32}}
    fresh = copy.deepcopy(oracle)
    wrapped = trained(oracle, **options)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected, tensors = merged(wrapped), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    in_old_form(tmp_path / "adapter", family)
    export(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "base", allow_pickle=True)
    assert_same(load_file(tmp_path / "new" / "adapter_model.safetensors"), tensors)
    assert_same(merged(PeftModel.from_pretrained(fresh, tmp_path / "new")), expected)
    export(tmp_path / "new", tmp_path / "again", base=tmp_path / "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_an_adapter_of_llava_next(tmp_path: Path) -> None:
    config = family_config("1.6-mistral")
    theirs = hf_family(config)
    copy_weights(theirs, LlavaLlamaForCausalLM(config)).save_pretrained(tmp_path / "base", processor=None)
    fresh, wrapped = copy.deepcopy(theirs), trained(theirs, r=2, lora_alpha=4, target_modules=["k_proj"], modules_to_save=["linear_1"])
    wrapped.save_pretrained(tmp_path / "adapter")
    in_old_form(tmp_path / "adapter", "4.36")
    export(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "base", allow_pickle=True)
    assert_same(merged(PeftModel.from_pretrained(fresh, tmp_path / "new")), merged(wrapped))


def make_lora(tmp_path: Path, kind: str = "v1.5", beside: Mapping[str, Tensor] = MappingProxyType({})) -> Path:
    """Write LLaVA's own LoRA folder in half precision, over the folder `original`."""
    made = make_original(tmp_path, kind)
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "config.json").write_text((made.path / "config.json").read_text())
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "base_model_name_or_path": "vicuna"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for layer in range(2):
        for module, rows in (("self_attn.q_proj", 64), ("mlp.up_proj", 96)):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{prefix}.lora_A.weight"] = torch.randn(2, 64, generator=generator).bfloat16()
            factors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 2, generator=generator).bfloat16()
    save_file(factors, folder / "adapter_model.safetensors")
    weights = original_names({name: weight.detach() for name, weight in made.model.named_parameters()})
    projector = {name: weight * 2 for name, weight in weights.items() if "mm_projector" in name}
    torch.save({f"base_model.model.{name}": weight for name, weight in {**projector, **beside}.items()}, folder / "non_lora_trainables.bin")
    return folder


def test_llavas_own_lora_folder_becomes_pefts(tmp_path: Path) -> None:
    """What was trained beside the factors are modules_to_save; the tower has a q_proj too, and is left alone."""
    import transformers

    folder, original = make_lora(tmp_path), tmp_path / "original"
    ours = LlavaLlamaForCausalLM.from_pretrained(folder, base=original, allow_pickle=True)
    settings = export(folder, tmp_path / "new", base=original, allow_pickle=True)
    convert(original, tmp_path / "hf")
    theirs = PeftModel.from_pretrained(transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf"), tmp_path / "new")
    assert settings["target_modules"][0] == "model.language_model.layers.0.mlp.up_proj"
    assert settings["modules_to_save"] == ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]
    assert (settings["base_model_name_or_path"], settings["task_type"]) == (None, "CAUSAL_LM")
    expected = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "new", base=tmp_path / "hf")
    found = copy_weights(theirs.merge_and_unload(), LlavaLlamaForCausalLM(expected.config))
    assert_same(dict(found.named_parameters()), dict(expected.named_parameters()))
    rows = ours.config.text_config.vocab_size
    for (name, weight), (_, other) in zip(ours.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(weight, other[:rows] if "embed_tokens" in name or "lm_head" in name else other), name
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {weight.dtype for name, weight in tensors.items() if "lora" in name} == {torch.bfloat16}


def test_language_models_have_adapters_too(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    wrapped = trained(hf_llama(), **ADAPTERS["patterns"])
    wrapped.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "base")
    assert_same(merged(PeftModel.from_pretrained(hf_llama(), tmp_path / "new")), merged(wrapped))
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "new", base=tmp_path / "base").state_dict(), merged(wrapped))


@pytest.mark.parametrize("hashes", [True, False])
def test_sums_are_written_where_they_are_wanted(tmp_path: Path, oracle: Any, hashes: bool) -> None:
    trained(oracle, r=2, lora_alpha=4, target_modules=["fc1"]).save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "new", Conversion(to="adapter", hashes=hashes, sources=Sources(base=tmp_path / "base")))
    manifest = read_manifest(tmp_path / "new")
    assert manifest is not None
    assert {entry.sha256 is not None for entry in manifest.values()} == {hashes}


def test_biases_that_were_trained(tmp_path: Path, oracle: Any) -> None:
    fresh = copy.deepcopy(oracle)
    wrapped = trained(oracle, r=2, lora_alpha=4, target_modules=["fc1"], bias="all")
    wrapped.save_pretrained(tmp_path / "adapter")
    settings = export(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "base")
    assert settings["modules_to_save"] is None
    assert_same(merged(PeftModel.from_pretrained(fresh, tmp_path / "new")), merged(wrapped))


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = make_lora(tmp_path, "v1.6", {"model.image_newline": torch.ones(64)})
    with pytest.raises(CheckpointError, match="image_newline, trained whole, is no module's weight or bias"):
        export(folder, tmp_path / "new", base=tmp_path / "original", allow_pickle=True)
    with pytest.raises(ConfigError, match="is no adapter"):
        export(tmp_path / "original", tmp_path / "new")
    with pytest.raises(ConfigError, match="keeps its dtype"):
        convert(folder, tmp_path / "new", Conversion(to="adapter", dtype=torch.float16))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [("model.mm_projector.4.weight", (64, 64), "no weight of the model"), ("model.mm_projector.0.weight", (3, 3), "expected \\[64, 32\\]")],
)
def test_what_fits_no_weight_is_refused(tmp_path: Path, name: str, shape: tuple[int, int], told: str) -> None:
    folder = make_lora(tmp_path, beside={name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match=told):
        export(folder, tmp_path / "new", base=tmp_path / "original", allow_pickle=True)


def test_half_a_module_is_refused(tmp_path: Path, oracle: Any) -> None:
    trained(oracle, r=2, target_modules=["q_proj"], modules_to_save=["linear_2"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(path).items() if "linear_2.bias" not in name}, path)
    with pytest.raises(CheckpointError, match=r"linear_2 was trained whole without its bias"):
        export(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "base")
