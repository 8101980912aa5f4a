"""checkpoint.load: every family of names gives the same tensors; what is not whole or not sound is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit.checkpoint.load import load_config, load_core, load_processor, load_weights
from llavakit.checkpoint.parts import Sources
from llavakit.errors import CheckpointError
from llavakit.model.config import LlamaConfig
from llavakit.model.decoder import LlamaDecoder
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.surgery import init_weights
from llavakit.processing.processor import LlavaProcessor
from llavakit.storage.tensors import write_tensors
from tests.tiny import SIDE, VARIANTS, VOCAB, Variant, llama_config, llava_config, tiny_processor

TIED = VARIANTS[2]
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def some_weights(variant: Variant = VARIANTS[0]) -> dict[str, Tensor]:
    core = LlavaCore(llava_config(variant))
    init_weights(core, 0.5, torch.Generator().manual_seed(variant.seed))
    return {name: weight.detach() for name, weight in core.named_parameters()}


def write(folder: Path, weights: dict[str, Tensor], config: LlavaConfig | LlamaConfig, *, max_shard_bytes: int = 1 << 40) -> None:
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    specs = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    write_tensors(folder, specs, iter(weights.items()), max_shard_bytes=max_shard_bytes)


def assert_same(core: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    found = dict(core.named_parameters())
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def family_b(name: str) -> str:
    if name == HEAD:
        return "lm_head.weight"
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name


FAMILIES: dict[str, Callable[[str], str]] = {
    "A": lambda name: name,
    "B": family_b,
    "C": lambda name: family_b(name).replace("vision_tower.vision_model.", "vision_tower."),
    "D": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
}


@pytest.mark.parametrize("max_shard_bytes", [1 << 40, 20_000])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_names_give_equal_tensors(tmp_path: Path, family: str, variant: Variant, max_shard_bytes: int) -> None:
    weights = some_weights(variant)
    write(
        tmp_path,
        {FAMILIES[family](name): weight for name, weight in weights.items()},
        llava_config(variant),
        max_shard_bytes=max_shard_bytes,
    )
    core = load_core(tmp_path)
    assert_same(core, weights)
    assert not core.training


def test_buffers_of_old_files_are_left_out(tmp_path: Path) -> None:
    weights = some_weights()
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    write(tmp_path, {**weights, **extra}, llava_config(VARIANTS[0]))
    assert_same(load_core(tmp_path), weights)


def test_target_dtype(tmp_path: Path) -> None:
    weights = some_weights()
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    assert_same(load_core(tmp_path, dtype=torch.bfloat16), {name: weight.bfloat16() for name, weight in weights.items()})


def test_missing_unexpected_and_misshapen_are_listed_together(tmp_path: Path) -> None:
    weights = some_weights()
    del weights[HEAD]
    weights["image_newline"] = torch.zeros(64)
    weights["language_model.model.norm.weight"] = torch.ones(63)
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    with pytest.raises(CheckpointError) as caught:
        load_core(tmp_path)
    for text in (f"missing {HEAD} [{VOCAB}, 64]", "unexpected image_newline [64]", "norm.weight has shape [63], expected [64]"):
        assert text in str(caught.value)


def test_names_are_checked_before_anything_is_filled(tmp_path: Path) -> None:
    weights = some_weights()
    del weights[HEAD]
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    with torch.device("meta"):
        core = LlavaCore(llava_config(VARIANTS[0]))
    with pytest.raises(CheckpointError):
        load_weights(core, tmp_path)
    assert all(weight.is_meta for weight in core.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    weights = some_weights()
    weights["multi_modal_projector.linear_1.bias"][-1] = value
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    with pytest.raises(CheckpointError, match=r"linear_1\.bias holds NaN or infinite"):
        load_core(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 1, 5_000, 10_239])
def test_nan_is_found_wherever_it_is(tmp_path: Path, dtype: torch.dtype, place: int) -> None:
    weights = {name: weight.to(dtype) for name, weight in some_weights().items()}
    weights[EMBEDDING].view(-1)[place] = float("nan")
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    with pytest.raises(CheckpointError, match="NaN"):
        load_core(tmp_path)


def test_overflow_of_the_target_dtype_is_refused(tmp_path: Path) -> None:
    weights = some_weights()
    weights[EMBEDDING][0, 0] = 1e6
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    assert load_core(tmp_path, dtype=torch.bfloat16) is not None
    with pytest.raises(CheckpointError, match=r"in torch\.float16"):
        load_core(tmp_path, dtype=torch.float16)


def test_dtypes_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, some_weights(), llava_config(VARIANTS[0]))
    with pytest.raises(CheckpointError, match=r"would be of torch\.float8_e4m3fn; choose"):
        load_core(tmp_path, dtype=torch.float8_e4m3fn)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    weights = some_weights()
    weights[EMBEDDING] = weights[EMBEDDING].to(torch.int8)
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    with pytest.raises(CheckpointError, match="only floating-point"):
        load_core(tmp_path)


def test_tied_head_is_one_tensor_and_a_second_copy_must_equal_it(tmp_path: Path) -> None:
    weights = some_weights(TIED)
    write(tmp_path, {HEAD: weights[EMBEDDING].clone(), **weights}, llava_config(TIED))
    core = load_core(tmp_path, dtype=torch.bfloat16)
    assert core.get_parameter(HEAD) is core.get_parameter(EMBEDDING)
    write(tmp_path, {HEAD: weights[EMBEDDING] + 1, **weights}, llava_config(TIED))
    with pytest.raises(CheckpointError, match="the config ties them"):
        load_core(tmp_path)


def test_llama_checkpoints_fill_a_model_with_or_without_head(tmp_path: Path) -> None:
    core = LlamaCore(llama_config())
    init_weights(core, 0.5, torch.Generator().manual_seed(0))
    weights = {name: weight.detach() for name, weight in core.named_parameters()}
    write(tmp_path, weights, llama_config())
    assert_same(load_core(tmp_path), weights)
    with torch.device("meta"):
        decoder = LlamaDecoder(llama_config())
    load_weights(decoder, tmp_path)
    assert_same(decoder, {name.removeprefix("model."): weight for name, weight in weights.items() if name != "lm_head.weight"})


def test_config_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(tmp_path)
    for values in (
        {"model_type": "llama", "hidden_size": "many"},
        {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": "bert"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            load_config(tmp_path)


def test_an_adapter_needs_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="name it with --base"):
        load_config(tmp_path)


def test_module_without_layout_is_a_bug(tmp_path: Path) -> None:
    write(tmp_path, some_weights(), llava_config())
    with pytest.raises(TypeError, match="Linear"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pickle_weights_load_where_they_are_allowed(tmp_path: Path, dtype: torch.dtype, num_files: int) -> None:
    weights = {name: weight.to(dtype) for name, weight in some_weights(TIED).items()}
    stored = {**weights, HEAD: weights[EMBEDDING], "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    (tmp_path / "config.json").write_text(llava_config(TIED).to_json(), encoding="utf-8")
    if num_files == 1:
        torch.save(stored, tmp_path / "pytorch_model.bin")
    else:
        files = {f"pytorch_model-{i + 1:05d}-of-{num_files:05d}.bin": list(stored)[i::num_files] for i in range(num_files)}
        for file, names in files.items():
            torch.save({name: stored[name] for name in names}, tmp_path / file)
        index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, names in files.items() for name in names}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"can run code .* set allow_pickle"):
        load_core(tmp_path)
    assert_same(load_core(tmp_path, sources=Sources(allow_pickle=True)), weights)


def test_safetensors_count_before_pickle(tmp_path: Path) -> None:
    weights = some_weights()
    write(tmp_path, weights, llava_config(VARIANTS[0]))
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert_same(load_core(tmp_path, sources=Sources(allow_pickle=True)), weights)


def test_pickle_weights_are_checked_like_others(tmp_path: Path) -> None:
    weights = some_weights()
    (tmp_path / "config.json").write_text(llava_config(VARIANTS[0]).to_json(), encoding="utf-8")
    torch.save({name: weight for name, weight in weights.items() if name != HEAD}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"missing {HEAD}"):
        load_core(tmp_path, sources=Sources(allow_pickle=True))
    weights[EMBEDDING][0, 0] = float("nan")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds NaN"):
        load_core(tmp_path, sources=Sources(allow_pickle=True))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
            "make pictures of 56 pixels",
        ),
        ("processor_config.json", {"patch_size": 14}, "make patches of 14 pixels, config.json takes patches of 7"),
        ("processor_config.json", {"patch_size": 0}, "patch_size=0"),
        ("processor_config.json", {"llavakit_template": ["v1"]}, r"names the template \['v1'\]"),
        ("processor_config.json", {"vision_feature_select_strategy": "full"}, "make 17 image tokens for a tile, config.json takes 16"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[SIDE, 2 * SIDE]]}, "only one cuts pictures into tiles"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "numbers from"),
        ("preprocessor_config.json", {"image_mean": [128, 128, 128]}, "numbers from 0 to 1"),
    ],
)
def test_processors_that_do_not_fit_the_model_are_refused(tmp_path: Path, name: str, change: dict[str, Any], told: str) -> None:
    tiny_processor().save_pretrained(tmp_path)
    stated = {key: value for key, value in llava_config().to_dict().items() if key != "vision_feature_select_strategy"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert isinstance(load_processor(tmp_path, load_config(tmp_path)), LlavaProcessor)
    values = json.loads((tmp_path / name).read_text("utf-8"))
    (tmp_path / name).write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=told):
        load_processor(tmp_path, load_config(tmp_path))
