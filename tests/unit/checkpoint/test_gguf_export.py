"""GGUF out: there and back bit for bit, what llama.cpp needs, what it cannot run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from llavakit import LLM, Conversation, LlamaForCausalLM, LlavaLlamaForCausalLM, SamplingParams
from llavakit.checkpoint.convert import Conversion, Output, convert
from llavakit.checkpoint.gguf_tokens import token_values
from llavakit.checkpoint.gguf_write import GgufType
from llavakit.checkpoint.hf import save_folder
from llavakit.checkpoint.load import load_config, load_processor
from llavakit.checkpoint.parts import Sources
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.chat import TEMPLATES
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.added_tokens import special_token
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.gguf_file import GgufFile
from tests.gguf_files import PICTURE, logits_of, save_hf, split_weights, write_both
from tests.meta_files import MetaLlama
from tests.original_folders import make_original
from tests.tiny import (
    IMAGE_TOKEN,
    SIDE,
    decoder_config,
    family_config,
    llama,
    llama3_tokenizer_folder,
    llava,
    llava_config,
    qwen_tokenizer_folder,
    scale_weights,
    tiny_processor,
    tiny_tokenizer,
)

F32, F16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0"))
BYTE_LEVEL = {"llama-bpe": llama3_tokenizer_folder, "qwen2": qwen_tokenizer_folder}
POST_NORM = "vision_tower.vision_model.post_layernorm"


@pytest.fixture(scope="module")
def model() -> LlavaLlamaForCausalLM:
    return llava()


@pytest.fixture(scope="module")
def hf_folder(model: LlavaLlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tmp_path_factory.mktemp("gguf") / "hf", model)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_there_and_back_no_bit_changes(tmp_path: Path, model: LlavaLlamaForCausalLM, kind: GgufType, dtype: torch.dtype) -> None:
    source = save_hf(tmp_path / "hf", llava().to(dtype))
    convert(source, tmp_path / "gguf", Conversion(to="gguf", gguf_type=kind))
    convert(tmp_path / "gguf", tmp_path / "back", Conversion(dtype=dtype))
    first, second = (dict(LlavaLlamaForCausalLM.from_pretrained(path).named_parameters()) for path in (source, tmp_path / "back"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == [f"{POST_NORM}.bias"]  # never used, left out
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back"))
    assert {name for name in old if old[name] != new[name]} <= {"pad_token_id"}  # which now is what the tokenizer says
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


ROADS: dict[str, tuple[str, str]] = {
    "1.6": ("1.6-vicuna", "v1"),
    "1.6 over Mistral": ("1.6-mistral", "mistral_instruct"),
    "SigLIP": ("1.6-siglip", "v1"),
}


@pytest.mark.parametrize("road", ROADS)
def test_the_family_goes_there_and_back(tmp_path: Path, road: str) -> None:
    family, template = ROADS[road]
    config = family_config(family)
    model = scale_weights(LlavaLlamaForCausalLM(config)).eval()
    is_siglip = not config.vision_config.has_cls
    pinpoints = tuple((width, height) for height, width in config.to_dict()["image_grid_pinpoints"])
    images = ImageProcessor(size_px=SIDE, crop_px=SIDE, aspect="anyres", pinpoints=pinpoints)
    if is_siglip:
        images = dataclasses.replace(images, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    processor = dataclasses.replace(tiny_processor(template, images), keep_cls=is_siglip, has_cls=not is_siglip)
    source = save_hf(tmp_path / "hf", model, processor)
    convert(source, tmp_path / "gguf", Conversion(to="gguf", gguf_type="f32"))
    first, second = (LLM(path) for path in (source, tmp_path / "gguf"))
    assert isinstance(second.processor, LlavaProcessor)
    assert second.processor.template.name == template
    assert dataclasses.replace(second.processor.image_processor, is_rounded=True) == images
    asked = Conversation.ask("what is there?", PICTURE)
    assert first.chat(asked, SamplingParams(max_tokens=4)).ids == second.chat(asked, SamplingParams(max_tokens=4)).ids


@pytest.mark.parametrize("kind", ["v1.5", "v1.6"])
def test_original_folders_become_gguf(tmp_path: Path, kind: str) -> None:
    original = make_original(tmp_path, kind)
    convert(original.path, tmp_path / "gguf", Conversion(to="gguf", gguf_type="f32"))
    first, second = (LLM(path) for path in (original.path, tmp_path / "gguf"))
    asked = Conversation.ask("what is there?", PICTURE)
    assert first.chat(asked, SamplingParams(max_tokens=4)).ids == second.chat(asked, SamplingParams(max_tokens=4)).ids


@pytest.mark.parametrize("to", ["hf", "original", "text"])
def test_gguf_becomes_every_other_layout(tmp_path: Path, model: LlavaLlamaForCausalLM, to: Output) -> None:
    source = write_both(tmp_path / "gguf", model)
    convert(source, tmp_path / "out", Conversion(to=to))
    kind = LlamaForCausalLM if to == "text" else LlavaLlamaForCausalLM
    weights = split_weights(model)[0] if to == "text" else dict(model.named_parameters())
    loaded = dict(kind.from_pretrained(tmp_path / "out").named_parameters())
    left = {name for name in weights if name not in loaded or not torch.equal(weights[name], loaded[name])}
    assert {name for name in left if POST_NORM not in name and ".layers.2." not in name} == set()


def test_a_language_model_goes_there_and_back(tmp_path: Path) -> None:
    model = llama()
    save_folder(model, tmp_path / "hf", processor=tiny_tokenizer())
    convert(tmp_path / "hf", tmp_path / "gguf", Conversion(to="gguf", gguf_type="f32"))
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["Modelfile", "README.md", "manifest.json", "model-f32.gguf"]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "gguf")
    assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in model.named_parameters())


def test_metas_files_become_gguf(tmp_path: Path) -> None:
    MetaLlama(num_files=2).save(tmp_path / "meta")
    how = Conversion(to="gguf", gguf_type="f32", sources=Sources(allow_pickle=True))
    convert(tmp_path / "meta", tmp_path / "gguf", how)
    convert(tmp_path / "meta", tmp_path / "hf", dataclasses.replace(how, to="hf", gguf_type=None))
    first, second = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "gguf"))
    assert all(torch.equal(weight.float(), second.get_parameter(name)) for name, weight in first.named_parameters())


def test_a_saved_copy_of_a_gguf_model_is_complete(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    folder = write_both(tmp_path / "gguf", model)
    processor = load_processor(folder, load_config(folder))
    assert isinstance(processor, LlavaProcessor)
    LlavaLlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "hf", processor=processor)
    assert torch.equal(logits_of(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "hf")), logits_of(model))


def exported(folder: Path, source: Path, kind: GgufType) -> tuple[gguf.GGUFReader, gguf.GGUFReader]:
    convert(source, folder, Conversion(to="gguf", gguf_type=kind))
    text, tower = sorted(folder.glob("*.gguf"), key=lambda path: path.name, reverse=True)[::-1]
    readers = {path.name.partition("-")[0]: gguf.GGUFReader(path) for path in (text, tower)}
    return readers["model"], readers["mmproj"]


def contents(reader: gguf.GGUFReader) -> Mapping[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def test_what_llama_cpp_needs_is_stated(tmp_path: Path, hf_folder: Path) -> None:
    text, tower = exported(tmp_path / "out", hf_folder, "f16")
    values = contents(text)
    assert values["general.architecture"] == "llama"
    assert {key: values[f"llama.{key}"] for key in ("context_length", "embedding_length", "block_count", "feed_forward_length")} == {
        "context_length": 256, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
    }  # fmt: skip
    assert (values["llama.attention.head_count"], values["llama.attention.head_count_kv"]) == (4, 2)
    assert (values["llama.rope.dimension_count"], values["llama.vocab_size"]) == (16, 384)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert (tokens[IMAGE_TOKEN], types[IMAGE_TOKEN], tokens[-1], types[-1]) == ("<image>", 3, "[PAD383]", 5)
    assert (len(tokens), types[:4]) == (384, [2, 3, 3, 6])
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert "ASSISTANT:" in values["tokenizer.chat_template"]
    vision = contents(tower)
    assert (vision["general.architecture"], vision["clip.projector_type"], vision["clip.use_gelu"]) == ("clip", "mlp", False)
    assert (vision["clip.vision.block_count"], vision["clip.vision.feature_layer"]) == (3, [2])
    assert np.allclose(vision["clip.vision.image_mean"], (0.48145466, 0.4578275, 0.40821073))
    assert vision["clip.vision.image_aspect_ratio"] == "pad"


def test_what_llama_cpp_must_not_see_is_left_out(tmp_path: Path, hf_folder: Path) -> None:
    text, tower = exported(tmp_path / "out", hf_folder, "f16")
    kinds = {tensor.name: tensor.tensor_type for reader in (text, tower) for tensor in reader.tensors}
    assert not any("post_ln" in name or name == "v.class_embd.weight" for name in kinds)
    assert (kinds["v.class_embd"], kinds["v.patch_embd.weight"], kinds["blk.0.attn_norm.weight"]) == (F32, F16, F32)
    assert (kinds["v.blk.0.attn_q.bias"], kinds["v.blk.0.ffn_down.weight"], kinds["token_embd.weight"]) == (F32, F16, F16)
    shapes = {tensor.name: list(tensor.shape) for tensor in tower.tensors}
    assert shapes["v.blk.0.ffn_down.weight"] == [32, 48]  # the first naming: it widens


@pytest.mark.parametrize(("kind", "packing"), [("q8_0", Q8_0), ("q4_0", Q4_0)])
def test_matrices_are_packed_by_the_library(
    tmp_path: Path, model: LlavaLlamaForCausalLM, hf_folder: Path, kind: GgufType, packing: gguf.GGMLQuantizationType
) -> None:
    text, tower = exported(tmp_path / "out", hf_folder, kind)
    kinds = {tensor.name: tensor.tensor_type for reader in (text, tower) for tensor in reader.tensors}
    assert (kinds["blk.1.ffn_up.weight"], kinds["output.weight"], kinds["v.blk.0.attn_q.weight"]) == (packing, Q8_0, F16)
    weight = split_weights(model)[0]["model.layers.1.mlp.up_proj.weight"]
    stored = next(tensor.data for tensor in text.tensors if tensor.name == "blk.1.ffn_up.weight")
    assert np.array_equal(stored, gguf.quants.quantize(weight.numpy(), packing))
    assert LLM(tmp_path / "out", dtype="float32").chat(Conversation.ask("hello"), SamplingParams(max_tokens=2)).ids


def test_rows_that_are_no_blocks_are_half_precision(tmp_path: Path) -> None:
    config = decoder_config("llama").to_dict() | {"intermediate_size": 40}
    model = scale_weights(LlamaForCausalLM(type(decoder_config("llama")).from_dict(config)))
    save_folder(model, tmp_path / "hf", processor=tiny_tokenizer())
    convert(tmp_path / "hf", tmp_path / "out", Conversion(to="gguf", gguf_type="q4_0"))
    file = GgufFile(tmp_path / "out" / "model-q4_0.gguf")
    file.close()
    assert (file.kinds["blk.0.ffn_down.weight"].name, file.kinds["blk.0.ffn_up.weight"].name) == ("F16", "Q4_0")


def test_added_tokens_that_are_pieces_too_have_the_types_of_added_ones() -> None:
    model = tiny_tokenizer().model_file
    first, second = (tiny_tokenizer().convert_ids_to_tokens(index) for index in (310, 311))
    added = {310: special_token(first), 311: AddedToken(second, normalized=False, special=False)}
    before, after = (token_values(words, 384) for words in (LlamaTokenizer(model), LlamaTokenizer(model, added_tokens=added)))
    types = after["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3]
    assert (types[310], types[311]) == (3, 4)
    assert {key for key in before if before[key] != after[key]} == {"tokenizer.ggml.token_type"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a linear projector": ({"mm_projector_type": "linear"}, "projectors of two layers"),
    "class tokens": ({"vision_feature_select_strategy": "full"}, "class token"),
    "states in another order": ({"vision_feature_layer": [2, 1]}, "in their order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    model = scale_weights(LlavaLlamaForCausalLM(LlavaConfig.from_dict({**llava_config().to_dict(), **change})))
    processor = dataclasses.replace(tiny_processor(), keep_cls=case == "class tokens")
    source = save_hf(tmp_path / "hf", model, processor)
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "out", Conversion(to="gguf"))
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_and_dtypes_are_refused(tmp_path: Path, hf_folder: Path) -> None:
    save_folder(llama(), tmp_path / "fast", processor=tiny_tokenizer())
    (tmp_path / "fast" / "tokenizer.model").unlink()  # what is left says the same in a way that GGUF files cannot
    with pytest.raises(ConfigError, match="of sentencepiece, Llama-3 and Qwen2"):
        convert(tmp_path / "fast", tmp_path / "out", Conversion(to="gguf"))
    with pytest.raises(ConfigError, match="choose gguf_type"):
        convert(hf_folder, tmp_path / "out", Conversion(to="gguf", dtype=torch.float16))
    with pytest.raises(ConfigError, match="gguf_type is for GGUF files"):
        convert(hf_folder, tmp_path / "out", Conversion(to="hf", gguf_type="f16"))


def test_numbers_beyond_a_type_are_an_error(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e6
    save_folder(model, tmp_path / "hf", processor=tiny_tokenizer())
    with pytest.raises(CheckpointError, match="choose a wider dtype"):
        convert(tmp_path / "hf", tmp_path / "out", Conversion(to="gguf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["interleave", "1.6-qwen", "1.6-llama3"])
def test_families_with_byte_level_tokenizers_go_there_and_back(tmp_path: Path, family: str) -> None:
    is_llama = family == "1.6-llama3"
    tokenizer = LlamaTokenizerFast.from_pretrained(BYTE_LEVEL["llama-bpe" if is_llama else "qwen2"](tmp_path / "words"))
    image = tokenizer.find_token("<image>")
    assert image is not None
    values = family_config(family).to_dict() | {"image_token_index": image}
    ends = [tokenizer.eos_token_id, 5] if is_llama else tokenizer.eos_token_id
    values["text_config"] |= {"rope_scaling": None, "rope_parameters": None, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends}
    config = LlavaConfig.from_dict(values)
    is_siglip = not config.vision_config.has_cls
    images = ImageProcessor(size_px=SIDE, crop_px=SIDE, aspect="pad")
    if config.merge is not None:
        images = dataclasses.replace(images, aspect="anyres", pinpoints=tuple((w, h) for h, w in values["image_grid_pinpoints"]))
    processor = LlavaProcessor(
        tokenizer=tokenizer, image_processor=images, template=TEMPLATES["llava_llama_3" if is_llama else "qwen"], image_token_id=image,
        patch_size=7, has_cls=not is_siglip, keep_cls=is_siglip,
    )  # fmt: skip
    source = save_hf(tmp_path / "hf", scale_weights(LlavaLlamaForCausalLM(config)).eval(), processor)
    convert(source, tmp_path / "gguf", Conversion(to="gguf", gguf_type="f32"))
    first, second = (LLM(path) for path in (source, tmp_path / "gguf"))
    asked = Conversation.ask("what is there?", PICTURE)
    assert first.chat(asked, SamplingParams(max_tokens=4)).ids == second.chat(asked, SamplingParams(max_tokens=4)).ids
    assert first.requests.end_ids == second.requests.end_ids
    convert(tmp_path / "gguf", tmp_path / "back")
    new = LlavaConfig.from_dict(json.loads((tmp_path / "back" / "config.json").read_text()))
    assert new.text_config.to_dict() == config.text_config.to_dict()
