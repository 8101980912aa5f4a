"""What builds on another folder: LoRA adapters (merged as peft merges), LLaVA's LoRA folders, deltas, projectors alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit import LLM, Conversation, LlamaForCausalLM, LlavaLlamaForCausalLM, SamplingParams
from llavakit.checkpoint.convert import Conversion, convert
from llavakit.checkpoint.parts import Sources
from llavakit.cli.main import run
from llavakit.errors import CheckpointError
from llavakit.storage.tensors import TensorFolder
from tests.folders import assert_same, edit_json
from tests.original_folders import make_original, original_names
from tests.tiny import family_config, hf_family, hf_llama, llava, tiny_processor, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, of its own making
DECODER = r".*language_model.*\.(q_proj|v_proj|down_proj)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj"]},
    "DoRA": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["k_proj", "up_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 32},
    },
    "a regex": {"r": 2, "lora_alpha": 2, "target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "embedding and head": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "lora_dropout": 0.3},
}  # fmt: skip


def trained(model: Any, **options: Any) -> Any:
    """Wrap a model of the oracle with adapters that do something."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(1.5)
            elif weight.requires_grad:
                weight.normal_(0.0, 0.2, generator=generator)
    return wrapped.eval()


def merged(wrapped: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in wrapped.merge_and_unload().state_dict().items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    hf_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("safe", [True, False])
def test_merging_equals_pefts_bit_for_bit(tmp_path: Path, base: Path, kind: str, safe: bool) -> None:
    wrapped = trained(hf_llama(), **ADAPTERS[kind])
    wrapped.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "adapter", base=base, allow_pickle=not safe)
    assert_same(model.state_dict(), merged(wrapped))


def test_an_adapter_names_its_base(tmp_path: Path, base: Path) -> None:
    wrapped = trained(hf_llama(), **ADAPTERS["plain"])
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "merged")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict(), merged(wrapped))
    conversation, params = Conversation.ask("a red circle"), SamplingParams(max_tokens=6)
    answers = [LLM(tmp_path / name, device="cpu").chat(conversation, params).ids for name in ("adapter", "merged")]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["plain", "rank-stabilised", "DoRA", "patterns", "embedding and head"])
def test_the_command_merges_as_peft_does(tmp_path: Path, base: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = trained(hf_llama(), **ADAPTERS[kind])
    wrapped.save_pretrained(tmp_path / "adapter")
    assert run(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(base)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}\n"
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict(), merged(wrapped))


def test_the_command_merges_projectors_and_refuses_whole_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, folder = make_original(tmp_path, "v1.5"), tmp_path / "pretrained"
    convert(made.path, tmp_path / "vicuna", Conversion(to="text"))
    folder.mkdir()
    (folder / "config.json").write_text((made.path / "config.json").read_text())
    weights = original_names({name: weight.detach() for name, weight in made.model.named_parameters()})
    torch.save({name: weight for name, weight in weights.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    options = ["--base", str(tmp_path / "vicuna"), "--allow-pickle"]
    assert run(["merge", str(folder), str(tmp_path / "merged"), *options]) == 0
    convert(made.path, tmp_path / "hf")
    assert_same(*(LlavaLlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "hf")))
    capsys.readouterr()
    assert run(["merge", str(tmp_path / "hf"), str(tmp_path / "no"), *options]) == 2
    assert "is a whole model" in capsys.readouterr().err
    assert run(["merge", str(made.path), str(tmp_path / "no")]) == 2
    assert "name its base with --base" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("family", ["1.5", "1.6-mistral"])
def test_adapters_of_transformers_llava_fit(tmp_path: Path, family: str) -> None:
    from tests.tiny import copy_weights

    config = family_config(family)
    oracle = hf_family(config)
    copy_weights(oracle, LlavaLlamaForCausalLM(config)).save_pretrained(tmp_path / "base", processor=None)
    wrapped = trained(oracle, r=4, lora_alpha=8, target_modules=DECODER)
    wrapped.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("language_model" in name for name in names)
    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "adapter", base=tmp_path / "base")
    expected = copy_weights(wrapped.merge_and_unload(), LlavaLlamaForCausalLM(config))
    assert_same(model.state_dict(), expected.state_dict())


def test_llavas_own_lora_folder(tmp_path: Path) -> None:
    """LLaVA writes adapters of its own class, and the projector beside them; the language model is Vicuna's."""
    made = make_original(tmp_path, "v1.5")
    convert(made.path, tmp_path / "vicuna", Conversion(to="text"))
    weights = original_names({name: weight.detach() for name, weight in made.model.named_parameters()})
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "config.json").write_text((made.path / "config.json").read_text())
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "lmsys/vicuna"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    projector = {name: weight * 2 for name, weight in weights.items() if "mm_projector" in name}
    torch.save({f"base_model.model.{name}": weight for name, weight in projector.items()}, folder / "non_lora_trainables.bin")
    model = LlavaLlamaForCausalLM.from_pretrained(folder, base=tmp_path / "vicuna", allow_pickle=True)
    expected = dict(made.model.state_dict())
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    expected[name] = expected[name] + b @ a * 2
    expected |= {name: weight * 2 for name, weight in expected.items() if name.startswith("multi_modal_projector.")}
    assert_same(model.state_dict(), expected)
    convert(folder, tmp_path / "hf", Conversion(sources=Sources(base=tmp_path / "vicuna", allow_pickle=True)))
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(again.state_dict()[name], expected[name])
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin is a pickle file"):
        LlavaLlamaForCausalLM.from_pretrained(folder, base=tmp_path / "vicuna")


def test_a_projector_alone(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1.5")
    convert(made.path, tmp_path / "vicuna", Conversion(to="text"))
    weights = original_names({name: weight.detach() for name, weight in made.model.named_parameters()})
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "config.json").write_text((made.path / "config.json").read_text())
    torch.save({name: weight for name, weight in weights.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    model = LlavaLlamaForCausalLM.from_pretrained(folder, base=tmp_path / "vicuna", allow_pickle=True)
    assert_same(model.state_dict(), made.model.state_dict())
    with pytest.raises(CheckpointError, match="--base"):
        LlavaLlamaForCausalLM.from_pretrained(folder, allow_pickle=True)


def projector_folder(tmp_path: Path, kind: str, named: Callable[[str], str]) -> tuple[Path, LlavaLlamaForCausalLM]:
    """Write a projector alone, whose names are told from those in a whole model, beside the folder `vicuna`."""
    made = make_original(tmp_path, kind)
    convert(made.path, tmp_path / "vicuna", Conversion(to="text"))
    weights = original_names({name: weight.detach() for name, weight in made.model.named_parameters()})
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "config.json").write_text((made.path / "config.json").read_text())
    torch.save({named(name): weight for name, weight in weights.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    return folder, made.model


@pytest.mark.parametrize("kind", ["v1", "v1.5"])
@pytest.mark.parametrize(
    "prefix", ["", "mm_projector.", "model.model.mm_projector.", "base_model.model.model.mm_projector.", "module.model.mm_projector."]
)
def test_projectors_have_names_of_many_wrappers(tmp_path: Path, kind: str, prefix: str) -> None:
    folder, model = projector_folder(tmp_path, kind, lambda name: prefix + name.removeprefix("model.mm_projector."))
    assert_same(LlavaLlamaForCausalLM.from_pretrained(folder, base=tmp_path / "vicuna", allow_pickle=True).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("name", "told"),
    [("layers.0.weight", r"unexpected layers\.0\.weight"), ("resampler.0.weight", "unexpected"), ("mm_projector.0.bias", "are both model")],
)
def test_other_names_are_not_taken_for_projectors(tmp_path: Path, name: str, told: str) -> None:
    folder, _ = projector_folder(tmp_path, "v1.5", lambda stored: name if stored.endswith("mm_projector.0.weight") else stored)
    with pytest.raises(CheckpointError, match=told):
        LlavaLlamaForCausalLM.from_pretrained(folder, base=tmp_path / "vicuna", allow_pickle=True)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"])
def test_files_that_lead_outside_are_refused(tmp_path: Path, base: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    trained(hf_llama(), r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(folder, safe_serialization="bin" not in name)
    path = folder / name
    if not path.exists():
        torch.save({}, path)
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} leads outside"):
        convert(folder, tmp_path / "new", Conversion(to="adapter", sources=Sources(base=base, allow_pickle=True)))


def test_deltas_are_added_exactly(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1")
    target = {name: weight.half() for name, weight in load_file(made.path / "model.safetensors").items()}
    rows = target["model.embed_tokens.weight"].shape[0]
    small = {
        name: torch.randn(weight.shape).half() for name, weight in target.items() if "mm_projector" not in name and "inv_freq" not in name
    }
    small |= {name: small[name][: rows - 5] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    (tmp_path / "base").mkdir()
    save_file(small, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    delta = {name: weight.clone() for name, weight in target.items()}
    for name, weight in small.items():
        delta[name][: weight.shape[0]] -= weight
    save_file(delta, made.path / "model.safetensors")
    model = LlavaLlamaForCausalLM.from_pretrained(made.path, base=tmp_path / "base")
    for name, weight in original_names(dict(model.state_dict())).items():
        if name in delta:
            plain = delta[name].clone()
            if name in small:
                plain[: small[name].shape[0]] += small[name]
            assert torch.equal(weight, plain), name
    save_file({**small, "model.more.weight": torch.ones(1)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.more\.weight is only in the base"):
        LlavaLlamaForCausalLM.from_pretrained(made.path, base=tmp_path / "base")


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_whole_model_is_not_added_to_a_base(tmp_path: Path, layout: str) -> None:
    made = make_original(tmp_path, "v1.5", tower_inside=True)
    convert(made.path, tmp_path / "hf")
    convert(made.path, tmp_path / "text", Conversion(to="text"))
    source, base = (made.path, tmp_path / "text") if layout == "original" else (tmp_path / "hf", tmp_path / "hf")
    with pytest.raises(CheckpointError, match="a whole model's, not what is to be added"):
        convert(source, tmp_path / "out", Conversion(sources=Sources(base=base)))


def edit(folder: Path, **values: Any) -> None:
    edit_json(folder / "adapter_config.json", **values)


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): weight for name, weight in load_file(path).items()}, path)


def reshape(folder: Path, kind: str, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(weight).contiguous() if kind in name else weight for name, weight in load_file(path).items()}, path)


def add_magnitudes(folder: Path, length: int) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    added = {name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(length) for name in weights if "lora_A" in name}
    save_file({**weights, **added}, path)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another kind": (lambda folder: edit(folder, peft_type="IA3"), "kind 'IA3'; LORA is read"),
    "transposed": (lambda folder: edit(folder, fan_in_fan_out=True), "fan_in_fan_out"),
    "no number": (lambda folder: edit(folder, lora_alpha="8"), "lora_alpha='8'"),
    "another model": (lambda folder: rename(folder, "layers.1", "layers.7"), "layers.7.* is no module of the model"),
    "another name": (lambda folder: rename(folder, "lora_A", "lora_C"), "not understood"),
    "half": (lambda folder: rename(folder, "1.self_attn.q_proj.lora_B", "1.self_attn.v_proj.lora_B"), "not understood"),
    "a bad pattern": (lambda folder: edit(folder, alpha_pattern={"(": 3}), "which is none"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights"),
    "an alpha of a module that is no number": (lambda folder: edit(folder, alpha_pattern={"q_proj": [1]}), r"alpha_pattern\['q_proj'\]"),
    "a rank that is none": (lambda folder: edit(folder, rank_pattern={"q_proj": "2"}), r"rank_pattern\['q_proj'\]='2'"),
    "patterns that are none": (lambda folder: edit(folder, alpha_pattern=3), "alpha_pattern=3; a table"),
    "an infinite alpha": (lambda folder: edit(folder, lora_alpha=float("inf")), "lora_alpha='inf'"),
    "a flat factor": (lambda folder: reshape(folder, "lora_A", lambda weight: weight.flatten()), r"factors \[128\] and \[64, 2\]"),
    "two ranks": (lambda folder: reshape(folder, "lora_A", lambda weight: weight[:1]), r"factors \[1, 64\] and \[64, 2\]"),
    "no rank": (lambda folder: reshape(folder, "lora", lambda weight: weight.new_zeros(*({2: 0}.get(n, n) for n in weight.shape))), "rank"),
    "short magnitudes": (lambda folder: add_magnitudes(folder, 1), r"magnitudes \[1\] for 64 rows"),
    "itself": (lambda folder: edit(folder, base_model_name_or_path=str(folder)), "without end"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, base: Path, kind: str) -> None:
    trained(hf_llama(), r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    action, told = FAULTS[kind]
    action(tmp_path / "adapter")
    sources = Sources(base=None if kind == "itself" else base)
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "adapter", tmp_path / "merged", Conversion(sources=sources, is_dry=True))


def test_adapters_that_adapt_each_other_are_refused(tmp_path: Path) -> None:
    for name, base in (("one", "two"), ("two", "one")):
        trained(hf_llama(), r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path / name)
        edit(tmp_path / name, base_model_name_or_path=str(tmp_path / base))
    with pytest.raises(CheckpointError, match="without end"):
        LlamaForCausalLM.from_pretrained(tmp_path / "one")
    with pytest.raises(CheckpointError, match="without end"):
        convert(tmp_path / "one", tmp_path / "new", Conversion(to="adapter"))


def test_an_adapter_of_a_merged_adapter(tmp_path: Path, base: Path) -> None:
    for name, below in (("one", tmp_path / "two"), ("two", base)):
        trained(hf_llama(), r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path / name)
        edit(tmp_path / name, base_model_name_or_path=str(below))
    plain = load_file(base / "model.safetensors")
    added = {name: weight - plain[name] for name, weight in LlamaForCausalLM.from_pretrained(tmp_path / "two").state_dict().items()}
    for name, weight in LlamaForCausalLM.from_pretrained(tmp_path / "one").state_dict().items():
        assert torch.allclose(weight, plain[name] + 2 * added[name], atol=1e-5), name


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_peft_began_by_changing_the_base(tmp_path: Path, base: Path, start: str) -> None:
    """PEFT takes the first factors out of the base; what it saves as plain LoRA fits the base as it was."""
    wrapped = get_peft_model(hf_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=start))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"):
        LlamaForCausalLM.from_pretrained(tmp_path / "adapter", base=base)
    found, expected = LlamaForCausalLM.from_pretrained(tmp_path / "plain", base=base).state_dict(), merged(wrapped)
    assert all(torch.allclose(found[name], weight, atol=1e-4) for name, weight in expected.items())


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_other_ways_of_changing_the_base(tmp_path: Path, base: Path, start: str) -> None:
    trained(hf_llama(), r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{start}'"):
        LlamaForCausalLM.from_pretrained(tmp_path / "adapter", base=base)


def test_an_adapter_on_a_llava_hf_folder_answers(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "base", processor=tiny_processor())
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(tmp_path / "base")})
    )
    path = "base_model.model.multi_modal_projector.linear_1"
    save_file(
        {f"{path}.lora_A.weight": torch.ones(1, 32), f"{path}.lora_B.weight": torch.ones(64, 1)}, folder / "adapter_model.safetensors"
    )
    convert(folder, tmp_path / "merged")
    with TensorFolder(tmp_path / "merged") as files, TensorFolder(tmp_path / "base") as old:
        name = "multi_modal_projector.linear_1.weight"
        assert torch.equal(files.read(name), old.read(name) + 1)
    params = SamplingParams(max_tokens=4)
    answers = [LLM(tmp_path / name, device="cpu").chat(Conversation.ask("a?"), params).ids for name in ("adapter", "merged")]
    assert answers[0] == answers[1]
