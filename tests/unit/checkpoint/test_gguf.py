"""GGUF in: the library's numbers, the original's logits and ids, every fault by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor

from llavakit import LLM, Conversation, LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM, SamplingParams
from llavakit.checkpoint.gguf_settings import gguf_tokenizer
from llavakit.checkpoint.load import build_core, load_config, load_processor
from llavakit.checkpoint.parts import Sources, open_parts
from llavakit.errors import CheckpointError
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.tokenizer.added_tokens import special_token
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.sentence_pieces import Piece, SentencePieces
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.gguf_files import IDS, PICTURE, logits_of, save_hf, split_weights, write_both, write_text, write_tower
from tests.real_data import llama2_tokenizer
from tests.tiny import (
    NUM_PIECES,
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
    tiny_tokenizer,
)

F32, F16, BF16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0"))
TEXTS = (
    "", " ", "what is there?", "  two  spaces ", "a red circle\n\n", "日本語 and 😀", "<s> </s> <image> <0x0A>", "\t1234,5", "▁x", "É" * 40,
)  # fmt: skip
MISTRAL = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.fixture(scope="module")
def model() -> LlavaLlamaForCausalLM:
    return llava()


@pytest.fixture(scope="module")
def hf_folder(model: LlavaLlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tmp_path_factory.mktemp("gguf") / "hf", model)


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
    assert LLM(folder).chat(Conversation.ask("what is there?", PICTURE), SamplingParams(max_tokens=3)).ids


@pytest.mark.parametrize("stem", ["mm.0", "mm"])
def test_projectors_of_one_layer_have_a_number_or_none(tmp_path: Path, stem: str) -> None:
    config = LlavaConfig.from_dict({**llava_config().to_dict(), "mm_projector_type": "linear"})
    model = scale_weights(LlavaLlamaForCausalLM(config)).eval()
    text, tower = split_weights(model)
    named = {name.replace("multi_modal_projector.linear_1", stem): weight for name, weight in tower.items()}
    write_text(tmp_path / "a.gguf", config.text_config, text)
    write_tower(tmp_path / "b.gguf", config, named)
    loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.mm_projector_type == "linear"
    assert torch.equal(logits_of(loaded), logits_of(model))


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


def test_an_older_key_scales_rotary_positions_too(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": torch.zeros(VOCAB, 64)}
    path = write_text(tmp_path / "x.gguf", llama_config(), weights, values={"llama.rope.scale_linear": 4.0})
    assert load_config(path).get_text_config().rope_scaling == {"type": "linear", "factor": 4.0}


def test_a_file_and_its_tower_may_be_named(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    folder = write_both(tmp_path, model)
    shutil.copy(folder / "second.gguf", folder / "third.gguf")  # of two towers nobody chooses
    with pytest.raises(CheckpointError, match="several towers"):
        load_config(folder)
    assert isinstance(LlamaForCausalLM.from_pretrained(folder / "first.gguf"), LlamaForCausalLM)
    loaded = LlavaLlamaForCausalLM.from_pretrained(folder / "first.gguf", vision_tower=folder / "third.gguf")
    assert torch.equal(logits_of(loaded), logits_of(model))
    llm = LLM(folder / "first.gguf", vision_tower=folder / "third.gguf")
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
    assert LLM(folder, base=path).chat(Conversation.ask("hello"), SamplingParams(max_tokens=2)).ids


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


def test_an_end_that_was_added_later_holds_its_role(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer(tiny_tokenizer().model_file, added_tokens={"<|im_end|>": 352}, eos_token="<|im_end|>")
    weights = {"model.embed_tokens.weight": torch.zeros(VOCAB, 4)}
    path = write_text(tmp_path / "x.gguf", llama_config(), weights, tokenizer=tokenizer, values={"tokenizer.ggml.eos_token_id": 352})
    read = gguf_tokenizer(path)
    assert (read.eos_token, read.eos_token_id, read.find_token("</s>")) == ("<|im_end|>", 352, 2)
    assert read("hello<|im_end|>")["input_ids"] == tokenizer("hello<|im_end|>")["input_ids"]


def test_tokens_among_the_pieces_are_cut_out_of_texts(tmp_path: Path) -> None:
    tokens = [tiny_tokenizer().convert_ids_to_tokens(index) for index in range(NUM_PIECES)]
    types = [2, 3, 3, *[6] * 256, *[1] * (NUM_PIECES - 259)]
    tokens[300:302], types[300:302] = ["<|im_start|>", "<tool>"], [3, 4]
    pieces = SentencePieces(tuple(Piece(text, -float(index), kind) for index, (text, kind) in enumerate(zip(tokens, types, strict=True))))
    tool = AddedToken("<tool>", normalized=False, special=False)
    tokenizer = LlamaTokenizer(pieces.to_model((0, 1, 2)), added_tokens={300: special_token("<|im_start|>"), 301: tool})
    values = {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(index) for index in range(NUM_PIECES)],
    }  # fmt: skip
    plain = LlamaTokenizer(tiny_tokenizer().model_file)
    read = gguf_tokenizer(write_text(tmp_path / "x.gguf", llama_config(), {}, tokenizer=plain, values=values))
    assert read.added_tokens_decoder == tokenizer.added_tokens_decoder
    text = "hello<|im_start|>there <tool> x"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert {300, 301} <= set(read(text)["input_ids"])
    assert not {300, 301} & set(read.encode_text(text))


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


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3", "qwen2"])
def test_bos_is_that_of_llama_cpp_where_a_file_does_not_say(tmp_path: Path, name: str) -> None:
    tokenizer = LlamaTokenizerFast.from_pretrained(BYTE_LEVEL["qwen2" if name == "qwen2" else "llama-bpe"](tmp_path / "words"))
    bos = tokenizer.find_token("<|endoftext|>" if name == "qwen2" else "<|begin_of_text|>")
    values = {"tokenizer.ggml.pre": name, "tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.add_bos_token": None}
    read = gguf_tokenizer(write_text(tmp_path / "x.gguf", llama_config(), {}, tokenizer=tokenizer, values=values))
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_file_may_do_without_bos(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizerFast.from_pretrained(llama3_tokenizer_folder(tmp_path / "words"))
    values = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    read = gguf_tokenizer(write_text(tmp_path / "x.gguf", llama_config(), {}, tokenizer=tokenizer, values=values))
    assert read("hello")["input_ids"] == tokenizer("hello")["input_ids"][1:]


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


EMBEDDING = torch.zeros(VOCAB, 64)
TOKENS = [f"t{index}" for index in range(384)]
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "falcon"}, "architecture 'falcon'; llama and qwen2"),
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
        LLM(folder)


def test_layers_that_only_the_file_has_are_listed(tmp_path: Path) -> None:
    names = (f"model.layers.{index}.input_layernorm.weight" for index in range(400))
    path = write_text(tmp_path / "x.gguf", llama_config(), dict.fromkeys(names, torch.ones(1)) | {"model.embed_tokens.weight": EMBEDDING})
    with pytest.raises(CheckpointError, match=r"unexpected blk\.2\.attn_norm.* and \d+ more"):
        LlamaForCausalLM.from_pretrained(path)
    core = build_core(load_config(path))
    with open_parts(path, core) as parts:
        assert len(parts[0].layout.renames) < 30


TOWER_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "half a pinpoint": ({"clip.vision.image_grid_pinpoints": [56, 28, 28]}, r"image_grid_pinpoints=\[56, 28, 28\]; expected pairs"),
    "tiles of no size": ({"clip.vision.image_aspect_ratio": "anyres"}, "image_aspect_ratio=anyres; .*with image_grid_pinpoints"),
    "another shape": ({"clip.vision.image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio=anyres_max_9; pad and square are read"),
    "no mean": ({"clip.vision.image_mean": None}, r"states clip\.vision\.image_mean=\[\]"),
}


@pytest.mark.parametrize("fault", TOWER_FAULTS)
def test_what_a_tower_lies_about_names_its_file(tmp_path: Path, model: LlavaLlamaForCausalLM, fault: str) -> None:
    values, message = TOWER_FAULTS[fault]
    folder = write_both(tmp_path, model, values=values)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(folder / 'second.gguf'))} .*{message}"):
        load_processor(folder, load_config(folder))


def test_a_processor_that_cuts_pictures_for_a_model_that_takes_none_is_refused(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    folder = write_both(tmp_path, model)
    config = load_config(folder)
    config.image_aspect_ratio = "anyres"
    with pytest.raises(CheckpointError, match="only one cuts pictures into tiles"):
        load_processor(folder, config)


def tower_with(folder: Path, model: LlavaLlamaForCausalLM, change: Callable[[dict[str, Tensor]], None]) -> Path:
    text, tower = split_weights(model)
    change(tower)
    write_text(folder / "a.gguf", model.config.text_config, text)
    write_tower(folder / "b.gguf", model.config, tower)
    return folder


def with_head(tower: dict[str, Tensor]) -> None:
    tower["vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 32)


def test_a_pooling_head_is_left_out(tmp_path: Path, model: LlavaLlamaForCausalLM) -> None:
    loaded = LlavaLlamaForCausalLM.from_pretrained(tower_with(tmp_path, model, with_head))
    assert torch.equal(logits_of(loaded), logits_of(model))


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
