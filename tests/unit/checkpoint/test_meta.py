"""Meta's own files: whole tensors under our names, the logits of Meta's arithmetic, and one error for what does not fit."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit import LLM, Conversation, LlamaForCausalLM, LlamaTokenizer, LlamaTokenizerFast, SamplingParams
from llavakit.checkpoint import convert as converting
from llavakit.checkpoint.load import load_config
from llavakit.checkpoint.meta import MetaFolder
from llavakit.checkpoint.parts import Sources
from llavakit.errors import CheckpointError, StorageError
from llavakit.storage.folder import manifest_problems
from llavakit.storage.tensors import TensorFolder
from tests.meta_files import MetaLlama
from tests.tiny import NUM_PIECES, llama3_tokenizer_folder

IDS = torch.tensor([1, 17, 300, 2, 45, 45, 8, 211])
MODELS = {
    "one file": MetaLlama(),
    "two files": MetaLlama(num_files=2),
    "one file, grouped heads": MetaLlama(num_kv_heads=2),
    "two files, grouped heads": MetaLlama(num_files=2, num_heads=8, num_kv_heads=2),
    "eight files, 8 of 16 heads": MetaLlama(num_files=8, num_heads=16, num_kv_heads=8, dim=64),
    "one key-value head": MetaLlama(num_kv_heads=1),
    "other base": MetaLlama(theta=1e6),
    "cut by rows": MetaLlama(num_files=2, is_cut_by_rows=True),
    "bfloat16": MetaLlama(num_files=2, dtype=torch.bfloat16),
}


def convert(source: Path, destination: Path, **options: Any) -> Path:
    progress = options.pop("progress", None)
    converting.convert(source, destination, converting.Conversion(sources=Sources(allow_pickle=True), **options), progress)
    return destination


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_metas_arithmetic(tmp_path: Path, kind: str) -> None:
    meta = MODELS[kind]
    folder = convert(meta.save(tmp_path / "meta"), tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.dtype == meta.dtype
    with torch.no_grad():
        logits = model.float()(IDS.unsqueeze(0)).logits[0]
    torch.testing.assert_close(logits, meta.logits(IDS), atol=1e-4, rtol=1e-4)
    assert manifest_problems(folder, check_hashes=True) == []
    direct = LlamaForCausalLM.from_pretrained(tmp_path / "meta", allow_pickle=True)
    with torch.no_grad():
        assert torch.equal(direct.float()(IDS.unsqueeze(0)).logits[0], logits)


def test_metas_files_are_asked_as_they_are(tmp_path: Path) -> None:
    folder = MetaLlama().save(tmp_path / "meta")
    llm = LLM(folder, allow_pickle=True, device="cpu")
    assert llm.chat(Conversation.ask("a red"), SamplingParams(max_tokens=3)).usage.completion_tokens == 3
    with pytest.raises(CheckpointError, match="allow_pickle"):
        LLM(folder)


def test_llama_3s_list_for_tiktoken_needs_tokenizer_json(tmp_path: Path) -> None:
    folder = MetaLlama(num_files=2, is_cut_by_rows=True).save(tmp_path / "meta", with_tokenizer=False)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match=r"the model's tokenizer\.json has to lie beside it"):
        convert(folder, tmp_path / "hf")
    words = LlamaTokenizerFast.from_pretrained(llama3_tokenizer_folder(folder))
    read = LlamaTokenizerFast.from_pretrained(convert(folder, tmp_path / "hf"))
    assert read.encode("a red <|eot_id|>") == words.encode("a red <|eot_id|>")
    assert load_config(tmp_path / "hf").get_text_config().eos_token_id == words.eos_token_id


def test_tensors_keep_their_bits(tmp_path: Path) -> None:
    meta = MODELS["two files, grouped heads"]
    weights = meta.weights()
    with TensorFolder(convert(meta.save(tmp_path / "meta"), tmp_path / "hf")) as files:
        assert torch.equal(files.read("model.embed_tokens.weight"), weights["tok_embeddings.weight"])
        assert torch.equal(files.read("model.layers.1.mlp.down_proj.weight"), weights["layers.1.feed_forward.w2.weight"])
        assert torch.equal(files.read("model.layers.0.self_attn.v_proj.weight"), weights["layers.0.attention.wv.weight"])
        keys = files.read("model.layers.0.self_attn.k_proj.weight").view(2, 2, 2, -1)  # heads, halves, half of a head's width
        assert torch.equal(keys.transpose(1, 2).reshape(8, -1), weights["layers.0.attention.wk.weight"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_the_oracle_loads_the_same(tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from transformers import LlamaForCausalLM as HfLlama

    meta = MODELS["two files, grouped heads"]
    folder = convert(meta.save(tmp_path / "meta"), tmp_path / "hf", max_shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        theirs = HfLlama.from_pretrained(folder, attn_implementation="eager")(IDS.unsqueeze(0)).logits[0]
    torch.testing.assert_close(theirs, meta.logits(IDS), atol=1e-4, rtol=1e-4)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a red circle") == AutoTokenizer.from_pretrained(folder).encode("a red circle")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {"max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}),
        ({"norm_eps": 1e-6}, {"max_position_embeddings": 2048}),
        ({"rope_theta": 1000000}, {"max_position_embeddings": 16384, "rope_theta": 1e6}),
        ({"rope_theta": 500000.0, "vocab_size": 384}, {"max_position_embeddings": 8192}),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, {"max_position_embeddings": 131072}),
    ],
)
def test_the_release_says_what_its_files_do_not(tmp_path: Path, params: dict[str, Any], expected: dict[str, Any]) -> None:
    folder = MetaLlama().save(tmp_path / "meta")
    change(folder, **params)
    with MetaFolder(folder) as files:
        assert {name: getattr(files.config, name) for name in expected} == expected
        assert (files.config.rope_scaling is not None) == ("use_scaled_rope" in params)


SCALINGS: dict[str, tuple[dict[str, Any], float, float]] = {
    "3.1": ({}, 8.0, 4.0),
    "3.2 of 1B": ({"dim": 2048, "n_heads": 32}, 32.0, 4.0),
    "3.2 of 3B": ({"dim": 3072, "n_heads": 24}, 32.0, 4.0),
    "stated": ({"dim": 2048, "n_heads": 32, "rope_scaling_factor": 16, "rope_high_freq_factor": 1.5}, 16.0, 1.5),
}


@pytest.mark.parametrize("release", SCALINGS)
def test_rotary_positions_scale_as_the_release_does(tmp_path: Path, release: str) -> None:
    params, factor, high = SCALINGS[release]
    folder = MetaLlama().save(tmp_path / "meta")
    change(folder, use_scaled_rope=True, **params)
    with MetaFolder(folder) as files:
        assert files.config.rope_scaling == {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip


def test_an_unexpected_failure_closes_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    folder, before = MetaLlama(num_files=2).save(tmp_path / "meta"), os.listdir("/proc/self/fd")
    monkeypatch.setattr("llavakit.checkpoint.meta._match", fail)
    with pytest.raises(MemoryError):
        MetaFolder(folder)
    assert os.listdir("/proc/self/fd") == before


def test_dtype_and_progress(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = MetaLlama().save(tmp_path / "meta")
    folder = convert(source, tmp_path / "hf", dtype=torch.float16, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(tensor.numel() * 4 for tensor in MetaLlama().weights().values())
    assert LlamaForCausalLM.from_pretrained(folder).dtype == torch.float16


def change(folder: Path, **params: Any) -> None:
    values = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**values, **params}))


def edit(folder: Path, action: Callable[[dict[str, Tensor]], object], *ranks: int) -> None:
    for rank in ranks:
        path = folder / f"consolidated.{rank:02d}.pth"
        weights = torch.load(path)
        action(weights)
        torch.save(weights, path)


NORM, QUERY, OUTPUT = "layers.0.ffn_norm.weight", "layers.1.attention.wq.weight", "layers.0.attention.wo.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda folder: (folder / "consolidated.00.pth").unlink(), "expected consolidated.00.pth and on"),
    "an unknown tensor": (
        lambda folder: edit(folder, lambda w: w.update(more=torch.ones(2)), 0, 1),
        "unexpected more",
    ),
    "in one file only": (lambda folder: edit(folder, lambda w: w.update(more=torch.ones(2)), 1), "more is only in consolidated.01.pth"),
    "gone from one file": (lambda folder: edit(folder, lambda w: w.pop(QUERY), 1), f"{QUERY} is not in consolidated.01.pth"),
    "a layer is missing": (lambda folder: change(folder, n_layers=3), r"missing model\.layers\.2"),
    "a layer too many": (lambda folder: change(folder, n_layers=1), r"unexpected model\.layers\.1"),
    "a tensor is missing": (
        lambda folder: edit(folder, lambda w: w.pop("norm.weight"), 0, 1),
        "missing model.norm.weight",
    ),
    "another shape": (lambda folder: edit(folder, lambda w: w.update({QUERY: torch.ones(16, 31)}), 1), r"\(16, 32\), \(16, 31\)"),
    "other dimensions": (
        lambda folder: edit(folder, lambda w: w.update({OUTPUT: w[OUTPUT].flatten()[:32]}), 1),
        rf"{OUTPUT} has \(32, 16\), \(32,\)",
    ),
    "another dtype": (lambda folder: edit(folder, lambda w: w.update({QUERY: w[QUERY].half()}), 1), "different models"),
    "another model": (lambda folder: edit(folder, lambda w: w.update({NORM: w[NORM] + 1}), 1), f"{NORM} is not the same in all files"),
    "NaN": (lambda folder: edit(folder, lambda w: w[QUERY].fill_(float("nan")), 0), "NaN"),
    "no width": (lambda folder: (folder / "params.json").write_text("{}"), "dim is missing"),
    "wrong width": (lambda folder: change(folder, dim=64), "the tensors are not those"),
    "wrong heads": (lambda folder: change(folder, n_heads="4"), "params.json does not describe"),
    "wrong base": (lambda folder: change(folder, rope_theta=[1]), "params.json does not describe"),
    "endless base": (lambda folder: change(folder, rope_theta=10**400), "rope_theta must be finite"),
    "endless eps": (lambda folder: change(folder, norm_eps=10**400), "rms_norm_eps must be finite"),
    "wrong scaling": (lambda folder: change(folder, use_scaled_rope=True, rope_scaling_factor="8"), "params.json does not describe"),
    "wrong vocabulary": (lambda folder: change(folder, vocab_size=32000), "vocab_size=32000"),
    "no pickle": (lambda folder: (folder / "consolidated.01.pth").write_bytes(b"junk"), "damaged"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    action, told = FAULTS[kind]
    folder = MetaLlama(num_files=2).save(tmp_path / "meta")
    action(folder)
    with pytest.raises(CheckpointError, match=told):
        convert(folder, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{NUM_PIECES} tokens, the model has 300 rows"):
        convert(MetaLlama(vocab_size=300).save(tmp_path / "meta"), tmp_path / "hf")


def test_what_is_there_stays(tmp_path: Path) -> None:
    source = MetaLlama().save(tmp_path / "meta")
    (tmp_path / "hf").mkdir()
    convert(source, tmp_path / "hf")  # an empty folder may be filled
    with pytest.raises(StorageError, match="exists"):
        convert(source, tmp_path / "hf")
