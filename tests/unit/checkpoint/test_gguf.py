"""GGUF in and out: the library's numbers, the original's logits, there and back bit for bit, every fault by name."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llavakit import LLM, Conversation, LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM, SamplingParams
from llavakit.checkpoint.convert import Conversion, Output, convert
from llavakit.checkpoint.gguf_settings import gguf_tokenizer
from llavakit.checkpoint.gguf_write import GgufType
from llavakit.checkpoint.hf import save_folder
from llavakit.checkpoint.load import load_config, load_processor
from llavakit.checkpoint.parts import Sources
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.chat import TEMPLATES
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.gguf_file import GgufFile
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.gguf_files import write_text, write_tower
from tests.meta_files import MetaLlama
from tests.original_folders import make_original
from tests.real_data import llama2_tokenizer
from tests.tiny import (
    IMAGE_TOKEN,
    SIDE,
    VARIANTS,
    VOCAB,
    Variant,
    decoder_config,
    family_config,
    llama,
    llama3_tokenizer_folder,
    llama_config,
    llava,
    llava_config,
    qwen_tokenizer_folder,
    scale_weights,
    tiny_processor,
    tiny_tokenizer,
)

F32, F16, BF16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0"))
PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 70, 30))
IDS = torch.tensor([[1, 5, 6, IMAGE_TOKEN, 7, 8]])
TEXTS = (
    "", " ", "what is there?", "  two  spaces ", "a red circle\n\n", "日本語 and 😀", "<s> </s> <image> <0x0A>", "\t1234,5", "▁x", "É" * 40,
)  # fmt: skip
MISTRAL = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
POST_NORM = "vision_tower.vision_model.post_layernorm"


def split_weights(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    text = {name.removeprefix("language_model."): weight for name, weight in weights.items() if name.startswith("language_model.")}
    return text, {name: weight for name, weight in weights.items() if not name.startswith("language_model.")}


def write_both(folder: Path, model: LlavaLlamaForCausalLM, kind: gguf.GGMLQuantizationType = F32, **how: Any) -> Path:
    text, tower = split_weights(model)
    write_text(folder / "first.gguf", model.config.text_config, text, kind)
    write_tower(folder / "second.gguf", model.config, tower, kind, **how)
    return folder


def save_hf(folder: Path, model: LlavaLlamaForCausalLM, processor: LlavaProcessor | None = None) -> Path:
    save_folder(model, folder, processor=tiny_processor() if processor is None else processor)
    return folder


def logits_of(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    result: Tensor = model(IDS, pixel_values=pixels).logits
    return result


@pytest.fixture(scope="module")
def model() -> LlavaLlamaForCausalLM:
    return llava()


@pytest.fixture(scope="module")
def hf_folder(model: LlavaLlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tmp_path_factory.mktemp("gguf") / "hf", model)


# In


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_logits_are_the_originals(tmp_path: Path, variant: Variant) -> None:
    model = llava(variant)
    loaded = LlavaLlamaForCausalLM.from_pretrained(write_both(tmp_path, model))
    assert loaded.config.text_config.tie_word_embeddings == variant.is_tied
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_half_precision_files_keep_their_numbers(tmp_path: Path) -> None:
    model = llava().half().float()
    loaded = LlavaLlamaForCausalLM.from_pretrained(write_both(tmp_path, model, F16))
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float16, torch.float32}
    assert torch.equal(logits_of(loaded.float()), logits_of(model))


@pytest.mark.parametrize("kind", [BF16, Q8_0, Q4_0, gguf.GGMLQuantizationType.Q5_1], ids=lambda kind: kind.name)
def test_weights_are_what_the_library_unpacks(tmp_path: Path, model: LlavaLlamaForCausalLM, kind: gguf.GGMLQuantizationType) -> None:
    text = split_weights(model)[0]
    path = write_text(tmp_path / "x.gguf", model.config.text_config, text, kind)
    weight = text["model.layers.1.mlp.up_proj.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    for dtype in (torch.float32, torch.float16):
        loaded = LlamaForCausalLM.from_pretrained(path, dtype=dtype)
        assert torch.equal(loaded.get_parameter("model.layers.1.mlp.up_proj.weight"), expected.to(dtype))
    default = LlamaForCausalLM.from_pretrained(path).get_parameter("model.layers.1.mlp.up_proj.weight")
    assert default.dtype == (torch.bfloat16 if kind == BF16 else torch.float16)


@pytest.mark.parametrize("how", [{}, {"is_legacy": False}, {"has_last_layer": True}, {"is_legacy": False, "has_last_layer": True}])
def test_towers_of_every_converter_give_the_same_features(tmp_path: Path, model: LlavaLlamaForCausalLM, how: dict[str, Any]) -> None:
    loaded = LlavaLlamaForCausalLM.from_pretrained(write_both(tmp_path, model, **how))
    assert loaded.config.vision_config.num_hidden_layers == (3 if how.get("has_last_layer") else 2)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("is_legacy", [True, False])
def test_pictures_of_any_size_are_known_by_their_keys(tmp_path: Path, is_legacy: bool) -> None:
    model = scale_weights(LlavaLlamaForCausalLM(family_config("1.6-vicuna")))
    folder = write_both(tmp_path, model, is_legacy=is_legacy)
    config = load_config(folder)
    assert isinstance(config, LlavaConfig)
    assert (config.merge, config.to_dict()["image_grid_pinpoints"]) == ("spatial_unpad", model.config.to_dict()["image_grid_pinpoints"])
    loaded = LlavaLlamaForCausalLM.from_pretrained(folder)
    assert loaded.image_newline is not None
    assert model.image_newline is not None
    assert torch.equal(loaded.image_newline, model.image_newline)
    assert LLM.load(folder).chat(Conversation.ask("what is there?", PICTURE), SamplingParams(max_tokens=3)).ids


def test_splits_are_one_model(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    text = split_weights(model)[0]
    write_text(tmp_path / "m.gguf", model.config.text_config, text, num_splits=3)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for path in (tmp_path, files[0], files[2]):
        loaded = LlamaForCausalLM.from_pretrained(path)
        assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in text.items())
    files[1].unlink()
    with pytest.raises(CheckpointError, match="all of its splits"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_file_and_its_tower_may_be_named(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    folder = write_both(tmp_path, model)
    shutil.copy(folder / "second.gguf", folder / "third.gguf")  # of two towers nobody chooses
    with pytest.raises(CheckpointError, match="several towers"):
        load_config(folder)
    assert isinstance(LlamaForCausalLM.from_pretrained(folder / "first.gguf"), LlamaForCausalLM)
    loaded = LlavaLlamaForCausalLM.from_pretrained(folder / "first.gguf", vision_tower=folder / "third.gguf")
    assert torch.equal(logits_of(loaded), logits_of(model))
    llm = LLM.load(folder / "first.gguf", vision_tower=folder / "third.gguf")
    assert llm.chat(Conversation.ask("what is there?", PICTURE), SamplingParams(max_tokens=2)).ids


def test_the_decoder_alone_has_no_head(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    text = split_weights(model)[0]
    path = write_text(tmp_path / "x.gguf", model.config.text_config, text)
    decoder = LlamaModel.from_pretrained(path)
    assert torch.equal(decoder.get_parameter("norm.weight"), text["model.norm.weight"])


def test_other_weights_in_a_folder_come_first(tmp_path: Path, hf_folder: Path, model: LlavaLlamaForCausalLM) -> None:
    shutil.copytree(hf_folder, tmp_path / "both")
    write_text(tmp_path / "both" / "x.gguf", model.config.text_config, {})
    assert load_config(tmp_path / "both") == load_config(hf_folder)


def test_biases_of_queries_and_keys_are_turned_too(tmp_path: Path) -> None:
    config = decoder_config("biases")
    model = scale_weights(LlamaForCausalLM(config)).eval()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    loaded = LlamaForCausalLM.from_pretrained(write_text(tmp_path / "x.gguf", config, weights))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_adapters_fit_gguf_bases(tmp_path: Path) -> None:
    model = llama()
    path = write_text(tmp_path / "x.gguf", llama_config(), {name: weight.detach() for name, weight in model.named_parameters()})
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    loaded, name = LlamaForCausalLM.from_pretrained(folder, base=path), "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name) + b @ a * 2)
    assert LLM.load(folder, base=path).chat(Conversation.ask("hello"), SamplingParams(max_tokens=2)).ids


# Tokenizers and templates


@pytest.mark.parametrize("words", [tiny_tokenizer, llama2_tokenizer])
def test_tokenizers_give_the_originals_ids(tmp_path: Path, words: Callable[[], LlamaTokenizer]) -> None:
    tokenizer = words()
    config = llama_config()
    values = {**config.to_dict(), "vocab_size": len(tokenizer) + 30, "hidden_size": 4, "num_attention_heads": 2}
    small = type(config).from_dict({name: value for name, value in values.items() if name != "model_type"} | {"num_key_value_heads": 1})
    weights = {"model.embed_tokens.weight": torch.zeros(small.vocab_size, 4)}
    read = gguf_tokenizer(write_text(tmp_path / "x.gguf", small, weights, tokenizer=tokenizer))
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [read.encode_text(text) for text in TEXTS] == [tokenizer.encode_text(text) for text in TEXTS]
    ids = tokenizer(list(TEXTS))["input_ids"]
    assert [read.decode(row) for row in ids] == [tokenizer.decode(row) for row in ids]
    assert read.added_tokens == tokenizer.added_tokens
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (tokenizer.pad_token_id, 1, 2)


BYTE_LEVEL = {"llama-bpe": llama3_tokenizer_folder, "qwen2": qwen_tokenizer_folder}


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokenizers_give_the_originals_ids(tmp_path: Path, kind: str) -> None:
    tokenizer = LlamaTokenizerFast.from_pretrained(BYTE_LEVEL[kind](tmp_path / "words"))
    weights = {"model.embed_tokens.weight": torch.zeros(VOCAB, 4)}
    path = write_text(tmp_path / "x.gguf", llama_config(), weights, tokenizer=tokenizer, values={"tokenizer.ggml.pre": kind})
    read = gguf_tokenizer(path)
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [read.encode_text(text) for text in TEXTS] == [tokenizer.encode_text(text) for text in TEXTS]
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert read.added_tokens_decoder == tokenizer.added_tokens_decoder


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
    first, second = (LLM.load(path) for path in (source, tmp_path / "gguf"))
    asked = Conversation.ask("what is there?", PICTURE)
    assert first.chat(asked, SamplingParams(max_tokens=4)).ids == second.chat(asked, SamplingParams(max_tokens=4)).ids
    assert first.end_ids == second.end_ids
    convert(tmp_path / "gguf", tmp_path / "back")
    new = LlavaConfig.from_dict(json.loads((tmp_path / "back" / "config.json").read_text()))
    assert new.text_config.to_dict() == config.text_config.to_dict()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "v1"),
        ({"tokenizer.chat_template": MISTRAL}, "mistral_instruct"),
        ({"llavakit.template": "llava_v1"}, "llava_v1"),
    ],
)
def test_the_template_is_chosen_as_in_other_folders(
    tmp_path: Path, model: LlavaLlamaForCausalLM, values: dict[str, Any], name: str
) -> None:
    text, tower = split_weights(model)
    write_tower(tmp_path / "b.gguf", model.config, tower)
    write_text(tmp_path / "a.gguf", model.config.text_config, text, values=values)
    assert load_processor(tmp_path, load_config(tmp_path)).template.name == name


# Faults


def broken(folder: Path, model: LlavaLlamaForCausalLM, **values: Any) -> Path:
    text, tower = split_weights(model)
    write_text(folder / "a.gguf", model.config.text_config, text, values=values)
    write_tower(folder / "b.gguf", model.config, tower)
    return folder


TOKENS = [f"t{index}" for index in range(384)]
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "falcon"}, "architecture 'falcon'; llama, qwen2"),
    "too few tokens": ({"tokenizer.ggml.tokens": TOKENS[:-1]}, "383 tokens and 384 rows"),
    "too few scores": ({"tokenizer.ggml.scores": [0.0]}, "384 tokens and 1 scores"),
    "a piece twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "t5"]}, "sentencepiece"),
    "types that do not exist": ({"tokenizer.ggml.token_type": [-5] * 384}, "types that do not exist"),
    "scores that do not exist": ({"tokenizer.ggml.scores": [float("nan")] * 384}, "scores that do not exist"),
    "another tokenizer": ({"tokenizer.ggml.model": "t5"}, "kind 't5'; llama and gpt2 are read"),
    "another way to cut words": ({"tokenizer.ggml.model": "gpt2"}, r"'default' \(tokenizer\.ggml\.pre\)"),
    "merges of nothing": (
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["no such"]},
        "cannot be used",
    ),
    "merges that are none": (
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": [1, 2]},
        "list of texts",
    ),
    "an end outside": ({"tokenizer.ggml.eos_token_id": 384}, "makes 384 the eos token"),
    "heads that do not fit": ({"llama.attention.head_count": 7}, "multiple"),
    "no heads": ({"llama.attention.head_count": 0}, "0 heads"),
    "endless layers": ({"llama.block_count": 4294967295}, "num_hidden_layers"),
    "more layers than there are": ({"llama.block_count": 3}, r"missing language_model\.model\.layers\.2"),
    "a width as text": ({"llama.embedding_length": "64"}, "expected int"),
    "another scaling": ({"llama.rope.scaling.type": "yarn"}, "scales its rotary positions"),
    "another feed-forward width": ({"llama.feed_forward_length": 97}, r"ffn_gate\.weight has shape \[96, 64\]"),
    "an unknown template": ({"llavakit.template": "nonsense"}, "names the template 'nonsense'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_that_lies_is_one_error(tmp_path: Path, model: LlavaLlamaForCausalLM, fault: str) -> None:
    values, message = FAULTS[fault]
    folder = broken(tmp_path, model, **values)
    with pytest.raises(CheckpointError, match=message):
        LLM.load(folder)


def tower_with(folder: Path, model: LlavaLlamaForCausalLM, change: Callable[[dict[str, Tensor]], None]) -> Path:
    text, tower = split_weights(model)
    change(tower)
    write_text(folder / "a.gguf", model.config.text_config, text)
    write_tower(folder / "b.gguf", model.config, tower)
    return folder


def without_norm(tower: dict[str, Tensor]) -> None:
    del tower["vision_tower.vision_model.pre_layrnorm.bias"]


def test_weights_that_are_missing_or_damaged_are_errors(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    folder = tower_with(tmp_path / "missing", model, without_norm)
    with pytest.raises(CheckpointError, match=r"missing vision_tower\.vision_model\.pre_layrnorm\.bias"):
        LlavaLlamaForCausalLM.from_pretrained(folder)
    nan = {"multi_modal_projector.linear_2.bias": torch.full((64,), float("nan"))}
    folder = tower_with(tmp_path / "damaged", model, lambda tower: tower.update(nan))
    with pytest.raises(CheckpointError, match=r"mm\.2\.bias holds NaN"):
        LlavaLlamaForCausalLM.from_pretrained(folder)


def test_files_that_do_not_belong_together_are_errors(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    folder = write_both(tmp_path / "both", model)
    with pytest.raises(CheckpointError, match="holds a tower but no language model"):
        load_config(folder / "second.gguf")
    with pytest.raises(CheckpointError, match="holds no tower"):
        load_config(folder / "first.gguf", Sources(vision_tower=folder / "first.gguf"))
    shutil.copy(folder / "first.gguf", folder / "third.gguf")
    with pytest.raises(CheckpointError, match="name one file instead of the folder"):
        load_config(folder)


# Out


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
    first, second = (LLM.load(path) for path in (source, tmp_path / "gguf"))
    assert isinstance(second.processor, LlavaProcessor)
    assert second.processor.template.name == template
    assert dataclasses.replace(second.processor.image_processor, is_rounded=True) == images
    asked = Conversation.ask("what is there?", PICTURE)
    assert first.chat(asked, SamplingParams(max_tokens=4)).ids == second.chat(asked, SamplingParams(max_tokens=4)).ids


@pytest.mark.parametrize("kind", ["v1.5", "v1.6"])
def test_original_folders_become_gguf(tmp_path: Path, kind: str) -> None:
    original = make_original(tmp_path, kind)
    convert(original.path, tmp_path / "gguf", Conversion(to="gguf", gguf_type="f32"))
    first, second = (LLM.load(path) for path in (original.path, tmp_path / "gguf"))
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
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["Modelfile", "manifest.json", "model-f32.gguf"]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "gguf")
    assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in model.named_parameters())


def test_metas_files_become_gguf(tmp_path: Path) -> None:
    MetaLlama(num_files=2).save(tmp_path / "meta")
    how = Conversion(to="gguf", gguf_type="f32", sources=Sources(allow_pickle=True))
    convert(tmp_path / "meta", tmp_path / "gguf", how)
    convert(tmp_path / "meta", tmp_path / "hf", dataclasses.replace(how, to="hf"))
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
    assert LLM.load(tmp_path / "out", dtype="float32").chat(Conversation.ask("hello"), SamplingParams(max_tokens=2)).ids


def test_rows_that_are_no_blocks_are_half_precision(tmp_path: Path) -> None:
    config = decoder_config("llama").to_dict() | {"intermediate_size": 40}
    model = scale_weights(LlamaForCausalLM(type(decoder_config("llama")).from_dict(config)))
    save_folder(model, tmp_path / "hf", processor=tiny_tokenizer())
    convert(tmp_path / "hf", tmp_path / "out", Conversion(to="gguf", gguf_type="q4_0"))
    file = GgufFile(tmp_path / "out" / "model-q4_0.gguf")
    file.close()
    assert (file.kinds["blk.0.ffn_down.weight"].name, file.kinds["blk.0.ffn_up.weight"].name) == ("F16", "Q4_0")


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


def test_numbers_beyond_a_type_are_an_error(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e6
    save_folder(model, tmp_path / "hf", processor=tiny_tokenizer())
    with pytest.raises(CheckpointError, match="choose a wider dtype"):
        convert(tmp_path / "hf", tmp_path / "out", Conversion(to="gguf"))
    assert not (tmp_path / "out").exists()
