"""from_pretrained, save_pretrained and push_to_hub: what they accept, what they refuse, and that the hub gets a whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from llavakit.errors import CheckpointError, ConfigError, StorageError
from llavakit.model.llava_config import LlavaConfig
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM
from llavakit.pretrained.files import PretrainedFiles
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.fake_hub import TOKEN, FakeHub, fake_hub, folder_files
from tests.tiny import llama, llama_config, llava, llava_config, save_llava, tiny_processor, tiny_tokenizer

__all__ = ["fake_hub"]
MODEL = "owner/llava-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> LlavaLlamaForCausalLM:
    return LlavaLlamaForCausalLM.from_pretrained(folder)


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in expected.state_dict().items())


def front_matter(card: bytes) -> dict[str, Any]:
    values: dict[str, Any] = ModelCard(card.decode()).data.to_dict()  # type: ignore[no-untyped-call]
    return values


def test_a_hub_id_loads_and_then_loads_offline(hub: FakeHub, folder: Path, model: LlavaLlamaForCausalLM) -> None:
    hub.add(MODEL, folder_files(folder))
    assert_same(LlavaLlamaForCausalLM.from_pretrained(MODEL), model)
    hub.stop()
    again = LlavaLlamaForCausalLM.from_pretrained(MODEL, local_files_only=True)
    assert_same(again, model)
    assert again.source is not None
    assert again.source.name == MODEL


def test_a_processor_and_a_tokenizer_come_without_weights(hub: FakeHub, folder: Path) -> None:
    hub.add(MODEL, folder_files(folder))
    assert LlavaProcessor.from_pretrained(MODEL).template == tiny_processor().template
    for cls in (LlamaTokenizer, LlamaTokenizerFast):
        assert cls.from_pretrained(MODEL, revision="main").encode("a circle") == tiny_tokenizer().encode("a circle")
    assert TextProcessor.from_pretrained(MODEL).tokenizer.encode_text("a circle") == tiny_tokenizer().encode_text("a circle")
    assert "model.safetensors" not in hub.fetched


def test_revision_cache_and_token_reach_the_hub(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.add(MODEL, {}).is_private = True
    hub.add(MODEL, folder_files(folder), revision="v2")
    model = LlavaLlamaForCausalLM.from_pretrained(MODEL, revision="v2", token=TOKEN, cache_dir=tmp_path / "elsewhere")
    assert model.source is not None
    assert model.source.folder.is_relative_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="has no revision v3"):
        LlavaLlamaForCausalLM.from_pretrained(MODEL, revision="v3", token=TOKEN)


def test_pickle_weights_need_the_flag(hub: FakeHub, folder: Path, tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    hub.add(MODEL, {"config.json": (folder / "config.json").read_bytes(), **folder_files(tmp_path)})
    with pytest.raises(CheckpointError, match="set allow_pickle"):
        LlavaLlamaForCausalLM.from_pretrained(MODEL)
    assert_same(LlavaLlamaForCausalLM.from_pretrained(MODEL, allow_pickle=True), model)


@pytest.mark.parametrize("value", ["float16", "torch.float16", torch.float16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype(folder: Path, name: str, value: Any) -> None:
    assert LlavaLlamaForCausalLM.from_pretrained(folder, **{name: value}).dtype == torch.float16


@pytest.mark.parametrize("value", ["cpu", "auto", torch.device("cpu")])
@pytest.mark.parametrize("name", ["device", "device_map"])
def test_both_names_of_the_device(folder: Path, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LlavaLlamaForCausalLM.from_pretrained(folder, **{name: value}).device == torch.device("cpu")


def test_a_given_config_replaces_the_folders(folder: Path, tmp_path: Path) -> None:
    config = llava_config()
    config.pad_token_id = 7
    assert LlavaLlamaForCausalLM.from_pretrained(folder, config=config).config.pad_token_id == 7
    values = llava_config().to_dict()
    other = LlavaConfig.from_dict({**values, "text_config": {**values["text_config"], "num_hidden_layers": 3}})
    with pytest.raises(CheckpointError, match=r"missing .*layers\.2"):
        LlavaLlamaForCausalLM.from_pretrained(folder, config=other)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"dtype": "float16", "torch_dtype": "float16"}, "dtype and torch_dtype are the same thing"),
        ({"torch_dtype": torch.int8}, "dtype must be one of float32"),
        ({"device": "cpu", "device_map": "auto"}, "device and device_map are the same thing"),
        ({"device": "gpu"}, "a device is auto, cpu, cuda"),
        ({"device_map": {"": 0}}, "a model lies on one device"),
        ({"device": "meta"}, "the meta device holds no numbers"),
        ({"device": "cuda:99"}, "there is no device cuda:99"),
        ({"config": llama_config()}, "config must be a LlavaConfig for LlavaLlamaForCausalLM, got LlamaConfig"),
        ({"low_cpu_mem_usage": False}, "low_cpu_mem_usage=False is not offered"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LlavaLlamaForCausalLM.from_pretrained(folder, **arguments)


def test_unknown_arguments_are_named(folder: Path) -> None:
    with pytest.raises(TypeError, match="'attn_implementation'"):
        LlavaLlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")  # type: ignore[call-arg]


@pytest.mark.parametrize(("size", "num_files"), [(60_000, 7), ("60KB", 7), ("60 KB", 7), ("1GB", 1), ("100KiB", 5)])
def test_shard_sizes(tmp_path: Path, size: int | str, num_files: int) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "out", max_shard_size=size)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == num_files
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("size", ["5", "GB", "5 gb", "-1GB", "", 0, -5, "0GB"])
def test_impossible_shard_sizes_are_refused(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        llama().save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only safetensors are written"):
        llama().save_pretrained(tmp_path / "out", safe_serialization=False)


def test_a_tokenizer_or_a_processor_goes_along(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "text", tokenizer=tiny_tokenizer())
    assert LlamaTokenizer.from_pretrained(tmp_path / "text").encode("a circle") == tiny_tokenizer().encode("a circle")
    with pytest.raises(ConfigError, match="the processor holds the tokenizer"):
        llava().save_pretrained(tmp_path / "both", processor=tiny_processor(), tokenizer=tiny_tokenizer())


def test_licences_follow_the_weights(folder: Path, tmp_path: Path) -> None:
    save_llava(tmp_path / "in")
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md"):
        (tmp_path / "in" / name).write_text(name, encoding="utf-8")
    LlavaLlamaForCausalLM.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    assert {"LICENSE.txt", "NOTICE", "USE_POLICY.md"} <= set(folder_files(tmp_path / "out"))
    assert "README.md" not in folder_files(tmp_path / "out")


def test_what_is_pushed_comes_back(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = llava()
    address = model.push_to_hub(MODEL, processor=tiny_processor(), private=True, commit_message="First", license="apache-2.0")
    assert hub.commits == [(MODEL, "main", "First")]
    assert address.startswith(f"{hub.url}/{MODEL}/commit/")
    assert hub.repos[MODEL].is_private
    files = hub.repos[MODEL].revisions["main"]
    assert {"config.json", "model.safetensors", "tokenizer.model", "preprocessor_config.json", "README.md"} <= set(files)
    assert "manifest.json" not in files
    assert front_matter(files["README.md"])["license"] == "apache-2.0"
    assert_same(LlavaLlamaForCausalLM.from_pretrained(MODEL), model)


def test_a_model_from_the_hub_names_its_base_and_takes_its_licence_along(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    card = b"---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE.txt\ntags:\n- x\n---\n# Base\n"
    hub.add("some/base", {**folder_files(folder), "README.md": card, "LICENSE.txt": b"terms", "USE_POLICY.md": b"policy"})
    LlavaLlamaForCausalLM.from_pretrained("some/base").push_to_hub(MODEL, revision="v2", processor=tiny_processor())
    files = hub.repos[MODEL].revisions["v2"]
    assert (files["LICENSE.txt"], files["USE_POLICY.md"]) == (b"terms", b"policy")
    data = front_matter(files["README.md"])
    assert [data[key] for key in ("base_model", "license", "license_name", "license_link")] == [
        "some/base",
        "other",
        "llama2",
        "LICENSE.txt",
    ]


@pytest.mark.parametrize("text", [llama(), LlamaModel(llama_config())], ids=["llama", "decoder"])
def test_language_models_are_pushed_with_their_tokenizer(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, text: PretrainedFiles) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text.push_to_hub(MODEL, tokenizer=tiny_tokenizer())
    assert "tokenizer.model" in hub.repos[MODEL].revisions["main"]
    assert_same(type(text).from_pretrained(MODEL), text)


def test_pushing_says_what_is_wrong(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="repo_id must be owner/name, got 'name'"):
        llama().push_to_hub("name")
    with pytest.raises(ConfigError, match="license must be one of the hub's ids"):
        llama().push_to_hub(MODEL, license="My Licence")
    with pytest.raises(CheckpointError, match="hf auth login"):
        llama().push_to_hub(MODEL)
    assert not hub.commits
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        llama().save_pretrained(tmp_path / "file")
