"""checkpoint.packed: GPTQ and AWQ folders load and convert as the dense models that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit import LLM, Conversation, LlamaForCausalLM, LlavaLlamaForCausalLM, SamplingParams
from llavakit.checkpoint.convert import Conversion, convert
from llavakit.checkpoint.load import load_config
from llavakit.checkpoint.packed import Packing, Unpacked, dense_tensors, packing_of_config
from llavakit.checkpoint.parts import Sources
from llavakit.cli.inspect import inspect
from llavakit.errors import CheckpointError
from llavakit.ops.quantize.layouts import LAYOUTS
from llavakit.storage.tensors import TensorFile, TensorFolder, write_tensors
from tests.original_folders import make_original, original_names
from tests.packed_folders import RECIPES, Recipe, quantise_folder
from tests.tiny import decoder_config, llama, llava, scale_weights, tiny_processor, tiny_tokenizer

FILE = "model.safetensors"
MODULE = "model.layers.1.mlp.down_proj"
IDS = torch.arange(3, 24).view(3, 7)


def text_folder(path: Path, config: Any = None) -> Path:
    model = llama() if config is None else scale_weights(LlamaForCausalLM(config))
    model.save_pretrained(path, tokenizer=tiny_tokenizer())
    return path


def logits_of_dense(folder: Path, weights: dict[str, Tensor]) -> Tensor:
    """Build the dense model by PyTorch's own loading."""
    model = LlamaForCausalLM(LlamaForCausalLM.from_pretrained(folder).config)
    model.load_state_dict(weights)
    logits: Tensor = model.eval()(IDS).logits
    return logits


def assert_same(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    found = dict(model.named_parameters())
    assert set(found) == set(weights)
    assert [name for name in found if found[name].dtype != torch.float16 or not torch.equal(found[name], weights[name])] == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_language_model_computes_as_its_dense_twin(tmp_path: Path, name: str) -> None:
    folder = text_folder(tmp_path)
    weights = quantise_folder(folder, RECIPES[name])
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)
    logits = LlamaForCausalLM.from_pretrained(folder, dtype="float32")(IDS).logits
    assert torch.equal(logits, logits_of_dense(folder, {name: weight.float() for name, weight in weights.items()}))


def family_b(name: str) -> str:
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return name.removeprefix("language_model.") if name.startswith("language_model.") else f"model.{name}"


@pytest.mark.parametrize("rename", [str, family_b], ids=["A", "B"])
@pytest.mark.parametrize("name", ["GPTQ act-order", "AWQ"])
def test_a_llava_hf_folder_loads_converts_and_answers(tmp_path: Path, name: str, rename: Callable[[str], str]) -> None:
    folder = tmp_path / "packed"
    llava().save_pretrained(folder, processor=tiny_processor())
    weights = quantise_folder(folder, RECIPES[name], rename=rename)
    assert_same(LlavaLlamaForCausalLM.from_pretrained(folder), weights)
    convert(folder, tmp_path / "dense")
    convert(folder, tmp_path / "original", Conversion(to="original"))
    assert load_file(tmp_path / "dense" / FILE).keys() == weights.keys()
    params = SamplingParams(max_tokens=6)
    answers = [LLM(tmp_path / kind, device="cpu").chat(Conversation.ask("a?"), params).ids for kind in ("packed", "dense", "original")]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("kind", ["v1.5", "v1.6 mistral"])
def test_an_original_folder_loads_and_converts(tmp_path: Path, kind: str) -> None:
    made = make_original(tmp_path, kind)
    weights = {name: weight for name, weight in quantise_folder(made.path, Recipe()).items() if not name.endswith("inv_freq")}
    model = LlavaLlamaForCausalLM.from_pretrained(made.path)
    found = original_names(dict(model.named_parameters()))
    assert [name for name, weight in weights.items() if not torch.equal(found[name], weight)] == []
    convert(made.path, tmp_path / "text", Conversion(to="text"))
    found = load_file(tmp_path / "text" / FILE)
    assert [name for name in found if not torch.equal(found[name], weights[name])] == []


@pytest.mark.parametrize("to", ["hf", "original", "text"])
def test_what_is_written_says_nothing_of_a_quantisation(tmp_path: Path, to: Any) -> None:
    folder = tmp_path / "packed"
    llava().save_pretrained(folder, processor=tiny_processor())
    quantise_folder(folder, Recipe(), state=False)
    edit(folder, text_config={**read(folder)["text_config"], "quantization_config": Recipe().settings()})
    convert(folder, tmp_path / "dense", Conversion(to=to))
    assert "quant" not in (tmp_path / "dense" / "config.json").read_text()
    assert read(tmp_path / "dense")["torch_dtype"] == "float16"


def test_a_loaded_model_may_be_saved_over_its_folder(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    weights = quantise_folder(folder, Recipe(), file="gptq_model-4bit-32g.safetensors", state=False)
    settings = {name: value for name, value in Recipe().settings().items() if name != "quant_method"}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return values


def edit(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read(folder), **values}), "utf-8")


@pytest.mark.parametrize(
    ("name", "values", "file"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": True, "is_marlin_format": False}, "gptq_model-4bit-32g.safetensors"),
        ("quantize_config.json", {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "GEMM"}, FILE),
        ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, "awq_model.safetensors"),
    ],
)
def test_settings_beside_the_config_and_other_file_names(tmp_path: Path, name: str, values: dict[str, Any], file: str) -> None:
    folder = text_folder(tmp_path)
    recipe = Recipe("awq", "gemm") if "version" in values else Recipe(is_symmetric=True)
    weights = quantise_folder(folder, recipe, file=file, state=False)
    (folder / name).write_text(json.dumps(values))
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)


def test_shards_are_read_in_the_order_of_their_data(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    weights = quantise_folder(folder, Recipe())
    packed = load_file(folder / FILE)
    (folder / FILE).unlink()
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(packed.items())}
    write_tensors(folder, specs, ((name, packed[name]) for name in specs), max_shard_bytes=50_000)
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)
    with TensorFolder(folder) as files:
        dense = dense_tensors(files, folder)
        assert sorted(dense.in_file_order()) == sorted(weights) == sorted(dense.specs)
        assert [name for name in dense.in_file_order() if name.endswith("norm.weight")] == sorted(n for n in weights if "norm.weight" in n)


def test_biases_of_zeros_that_no_model_has_are_left_out(tmp_path: Path) -> None:
    folder = text_folder(tmp_path, decoder_config("qwen2"))
    weights = quantise_folder(folder, Recipe())
    assert weights["model.layers.0.self_attn.q_proj.bias"].any()
    change(folder, {f"{MODULE}.bias": torch.zeros(64).half()})
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)
    change(folder, {f"{MODULE}.bias": torch.ones(64).half()})
    with pytest.raises(CheckpointError, match=rf"unexpected {MODULE}\.bias"):
        LlamaForCausalLM.from_pretrained(folder)


def test_an_index_of_zeros_stands_for_none(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    weights = quantise_folder(folder, Recipe())
    change(folder, {name: index * 0 for name, index in load_file(folder / FILE).items() if name.endswith("g_idx")})
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)


def test_an_adapter_is_merged_into_the_dense_weights(tmp_path: Path) -> None:
    weights = quantise_folder(text_folder(tmp_path / "base"), RECIPES["AWQ"])
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(tmp_path / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    path = f"base_model.model.{MODULE}"
    save_file(
        {f"{path}.lora_A.weight": torch.ones(1, 96), f"{path}.lora_B.weight": torch.ones(64, 1)}, folder / "adapter_model.safetensors"
    )
    weights[f"{MODULE}.weight"] = (weights[f"{MODULE}.weight"].float() + 1).half()
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)
    values = {**read(tmp_path / "base"), "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(values))  # as QLoRA leaves it, whatever its base is
    assert_same(LlamaForCausalLM.from_pretrained(folder), weights)


def test_pickled_weights_are_unpacked_too(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    weights = quantise_folder(folder, Recipe())
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    assert_same(LlamaForCausalLM.from_pretrained(folder, allow_pickle=True), weights)


def test_inspect_counts_the_dense_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = text_folder(tmp_path)
    weights = quantise_folder(folder, Recipe())
    inspect(str(folder), json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == sum(weight.numel() for weight in weights.values())
    assert facts["bytes"] < 2 * facts["parameters"]
    assert facts["dtypes"]["int32"] == 3 * 14


def change(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """Add and replace tensors; None removes one."""
    files = {**load_file(folder / FILE), **tensors}
    save_file({name: tensor for name, tensor in files.items() if tensor is not None}, folder / FILE)


def words(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


INDEX = torch.arange(96, dtype=torch.int32) // 32
FAULTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no zeros": ({f"{MODULE}.qzeros": None}, r"down_proj\.qzeros is missing"),
    "no scales": ({f"{MODULE}.scales": None}, r"down_proj\.scales is missing"),
    "no words": ({f"{MODULE}.qweight": None}, r"down_proj\.scales has no qweight"),
    "words of another dtype": ({f"{MODULE}.qweight": words(12, 64).long()}, r"down_proj\.qweight is int64 \[12, 64\], which no words"),
    "words of another rank": ({f"{MODULE}.qweight": words(12)}, r"down_proj\.qweight is int32 \[12\], which no words"),
    "outputs that fill no words": ({f"{MODULE}.qweight": words(12, 63)}, "63 outputs; whole blocks of 8"),
    "zeros of other bits": ({f"{MODULE}.qzeros": words(3, 16)}, r"qzeros is int32 \[3, 16\], expected int32 \[3, 8\]"),
    "scales of other groups": ({f"{MODULE}.scales": torch.ones(1, 64).half()}, r"scales is float16 \[1, 64\], expected .* \[3, 64\]"),
    "scales of another dtype": ({f"{MODULE}.scales": words(3, 64)}, r"scales is int32 \[3, 64\], expected float16 or"),
    "an index of other inputs": ({f"{MODULE}.g_idx": INDEX[:95]}, r"g_idx is int32 \[95\], expected int32 or int64 \[96\]"),
    "an index beyond the groups": ({f"{MODULE}.g_idx": INDEX + 1}, "g_idx names groups 1 to 3 of 3"),
    "an index before the groups": ({f"{MODULE}.g_idx": INDEX - 1}, "g_idx names groups -1 to 1 of 3"),
    "a dense weight too": ({f"{MODULE}.weight": torch.ones(64, 96).half()}, r"down_proj\.weight is there beside qweight"),
    "an infinite scale": ({f"{MODULE}.scales": torch.full((3, 64), float("inf")).half()}, r"down_proj\.weight holds NaN or infinite"),
    "several": ({f"{MODULE}.qzeros": None, "model.layers.0.mlp.up_proj.g_idx": INDEX[:64] + 9}, "names groups.*;.*is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, kind: str) -> None:
    folder = text_folder(tmp_path / "packed")
    quantise_folder(folder, Recipe())
    tensors, told = FAULTS[kind]
    change(folder, tensors)
    with pytest.raises(CheckpointError, match=told):
        convert(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_awq_has_no_index(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    quantise_folder(folder, RECIPES["AWQ"])
    change(folder, {f"{MODULE}.g_idx": INDEX})
    with pytest.raises(CheckpointError, match="g_idx is there, but this packing has none"):
        LlamaForCausalLM.from_pretrained(folder)


def test_packed_tensors_need_settings_and_settings_packed_tensors(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    edit(folder, quantization_config=Recipe().settings())
    with pytest.raises(CheckpointError, match="no tensor is packed"):
        LlamaForCausalLM.from_pretrained(folder)
    edit(folder, quantization_config=None)
    quantise_folder(folder, Recipe(), state=False)
    with pytest.raises(CheckpointError, match=r"holds packed tensors; how, quantization_config .* quant_config\.json has to say"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_than_stated_are_noticed(tmp_path: Path, bits: int) -> None:
    folder = text_folder(tmp_path)
    quantise_folder(folder, Recipe())
    edit(folder, quantization_config=Recipe(bits=bits).settings())
    with pytest.raises(CheckpointError, match="the packed tensors are not whole"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised \(bitsandbytes\); GPTQ \(gptq, gptq_v2\).*are read"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_8bit": True}, "unknown method"),
        ({"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 32}, "awq, gemv, 4 bits"),
        ({"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "backend": "llm-awq"}, "awq, llm-awq"),
        ({"quant_method": "awq", "version": "gemm", "bits": 3, "group_size": 32}, "awq, gemm, 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "gptq, marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True}, "gptq, marlin"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "gptq, gptq, 5 bits"),
        ({"quant_method": "gptq", "bits": [4], "group_size": 32}, r"\[4\] bits"),
        ({"quant_method": "gptq", "bits": True, "group_size": 32}, "True bits"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32, "meta": {"quantizer": ["gptqmodel:1.0"]}}, "gptq by GPTQModel, 3 bits"),
        ({"quant_method": "gptq", "bits": 4}, "group_size=None"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "32"}, "group_size='32'"),
        ("gptq", "'gptq'; a table was expected"),
    ],
)
def test_other_quantisations_are_named(tmp_path: Path, values: Any, told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": values}))
    with pytest.raises(CheckpointError, match=told):
        load_config(tmp_path)


def test_the_spellings_of_both_writers_mean_the_same() -> None:
    awq = Packing(LAYOUTS["awq", "gemm", 4], 64, "AWQ (gemm) of 4 bits, groups of 64")
    for values in (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        {"quant_method": "AWQ", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 64},
    ):
        assert packing_of_config({"text_config": {"quantization_config": values}}) == awq
    for key in ("format", "checkpoint_format"):
        values = {"quant_method": "gptq", "bits": 4, "group_size": 64, key: "gptq_v2"}
        expected = Packing(LAYOUTS["gptq", "gptq_v2", 4], 64, "GPTQ (gptq_v2) of 4 bits, groups of 64")
        assert packing_of_config({"quantization_config": values}) == expected


def test_one_module_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_folder(tmp_path)
    quantise_folder(folder, Recipe())
    asked: list[str] = []
    read_whole = TensorFile.read

    def watched(file: TensorFile, name: str) -> Tensor:
        asked.append(name)
        return read_whole(file, name)

    with TensorFolder(folder) as files:
        dense = Unpacked(files, Packing(LAYOUTS["gptq", "gptq", 4], 32, "GPTQ"), folder)
        monkeypatch.setattr(TensorFile, "read", watched)
        dense.read(f"{MODULE}.weight")
        dense.read("model.norm.weight")
    assert asked == [f"{MODULE}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx")] + ["model.norm.weight"]


def test_llavas_with_a_quantised_base(tmp_path: Path) -> None:
    """A projector alone, over a quantised language model."""
    made = make_original(tmp_path, "v1.5")
    convert(made.path, tmp_path / "vicuna", Conversion(to="text"))
    weights = quantise_folder(tmp_path / "vicuna", RECIPES["AWQ"])
    projector = original_names({name: weight.detach() for name, weight in made.model.named_parameters()})
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "config.json").write_text((made.path / "config.json").read_text())
    torch.save({name: weight for name, weight in projector.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    sources = Sources(base=tmp_path / "vicuna", allow_pickle=True)
    convert(folder, tmp_path / "hf", Conversion(sources=sources))
    found = load_file(tmp_path / "hf" / FILE)
    assert torch.equal(found[f"language_model.{MODULE}.weight"], weights[f"{MODULE}.weight"])
