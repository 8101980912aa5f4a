"""checkpoint.hf: a save is complete, says what it wrote, and reads back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llavakit.checkpoint.hf import save_checkpoint, save_folder
from llavakit.checkpoint.load import load_config, load_core
from llavakit.errors import StorageError
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.surgery import init_weights
from llavakit.pretrained.causal_lm import LlamaModel
from llavakit.storage.folder import manifest_problems
from tests.tiny import VARIANTS, Variant, llama_config, llava_config


def some_core(variant: Variant = VARIANTS[0], *, std: float = 0.5) -> LlavaCore:
    core = LlavaCore(llava_config(variant))
    init_weights(core, std, torch.Generator().manual_seed(variant.seed))
    return core


def read_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    weights = dict(expected.named_parameters())
    assert [name for name, _ in found.named_parameters()] == list(weights)
    assert all(torch.equal(weight, weights[name]) and weight.dtype == weights[name].dtype for name, weight in found.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [1 << 40, 10_000])
def test_save_and_load_are_bit_exact(tmp_path: Path, variant: Variant, dtype: torch.dtype, max_shard_bytes: int) -> None:
    core = some_core(variant).to(dtype)
    save_folder(core, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    loaded = load_core(tmp_path / "out")
    assert_same(loaded, core)
    save_folder(loaded, tmp_path / "again", max_shard_bytes=max_shard_bytes)
    assert read_config(tmp_path / "again") == read_config(tmp_path / "out")
    assert manifest_problems(tmp_path / "out", check_hashes=True) == []


def test_text_models_round_trip(tmp_path: Path) -> None:
    core = LlamaCore(llama_config())
    init_weights(core, 0.5, torch.Generator().manual_seed(0))
    save_folder(core, tmp_path / "out")
    assert_same(load_core(tmp_path / "out"), core)
    assert read_config(tmp_path / "out")["architectures"] == ["LlamaForCausalLM"]
    model = LlamaModel(llama_config())
    save_checkpoint(model, tmp_path)
    assert_same(LlamaModel.from_pretrained(tmp_path), model)
    assert read_config(tmp_path)["architectures"] == ["LlamaModel"]


def test_config_states_the_dtype_that_was_written(tmp_path: Path) -> None:
    core = some_core()
    core.config.dtype = "float16"
    core.config.text_config.torch_dtype = "float16"
    core.language_model.bfloat16()
    save_folder(core, tmp_path / "out")
    values = read_config(tmp_path / "out")
    assert (values["dtype"], values["torch_dtype"]) == ("float32", "float32")
    assert "torch_dtype" not in values["text_config"]


def test_unknown_keys_of_the_config_survive(tmp_path: Path) -> None:
    core = some_core()
    core.config.favourite = {"colour": "blue"}
    core.config.pad_token_id = 151
    save_folder(core, tmp_path / "out")
    assert load_config(tmp_path / "out").favourite == {"colour": "blue"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))["pad_token_id"] == 151


def test_saving_over_a_checkpoint_keeps_everything_but_weights(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_folder(some_core(), out, max_shard_bytes=10_000)
    (out / "tokenizer.model").write_bytes(b"pieces")
    (out / "runs").mkdir()
    (out / "runs" / "log").write_bytes(b"log")
    save_folder(some_core(std=0.1), out)
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert (out / "runs" / "log").read_bytes() == b"log"
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same(load_core(out), some_core(std=0.1))


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(some_core(), tmp_path / "out")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llavakit.checkpoint.hf.write_tensors", fail)
    with pytest.raises(StorageError, match="No space left"):
        save_folder(some_core(std=0.1), tmp_path / "out")
    assert_same(load_core(tmp_path / "out"), some_core())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
