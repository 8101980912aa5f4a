"""The documentation page that this project makes true, entry by entry: its command, its snippet, its tips and its list of methods.

The page is the Llava page that was proposed for transformers in 2023 (LlavaConfig, LlamaTokenizer, LlamaTokenizerFast, LlamaModel,
LlavaLlamaForCausalLM, with Llama-2's tips). Only import lines and the command's name differ. Everything runs on a text-only folder and
on a llava-hf folder of each family.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import llavakit
from llavakit import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaTokenizer,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaProcessor,
)
from llavakit.cli.main import run
from llavakit.pretrained.pictures import gather
from llavakit.processing.image import ImageProcessor
from tests.meta_files import MetaLlama
from tests.tiny import FAMILIES, IMAGE_TOKEN, PAD_TOKEN, SIDE, VOCAB, family_config, llama, scale_weights, tiny_processor, tiny_tokenizer

TEXT = "Is there a red circle at the top left?"


@pytest.fixture(scope="module")
def output_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only folder, as the page's command makes it from weights of Meta's layout."""
    command = """
llava convert-llama-weights \\
    --input_dir /path/to/downloaded/llama/weights --model_size 7B --output_dir /output/path
"""
    folder = tmp_path_factory.mktemp("llama")
    weights = folder / "weights"
    MetaLlama(dim=64, ffn=96, num_kv_heads=2).save(weights / "7B", with_tokenizer=False)
    (weights / "tokenizer.model").write_bytes(tiny_tokenizer().files()["tokenizer.model"])
    command = command.replace("/path/to/downloaded/llama/weights", str(weights)).replace("/output/path", str(folder / "output"))
    assert run(command.replace("\\\n", " ").split()[1:]) == 0
    return folder / "output"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llava-hf folder of each family."""
    folder = tmp_path_factory.mktemp("llava")
    config = family_config(request.param)
    model = scale_weights(LlavaLlamaForCausalLM(config), 1).eval()
    pinpoints = tuple((width, height) for height, width in getattr(config, "image_grid_pinpoints", ()))
    images = ImageProcessor(size_px=SIDE, crop_px=SIDE, aspect="anyres" if pinpoints else "pad", pinpoints=pinpoints)
    model.save_pretrained(folder, processor=tiny_processor(image_processor=images))
    return folder


def test_the_snippet_that_loads_model_and_tokenizer(output_path: Path) -> None:
    snippet = """
from llavakit import LlamaForCausalLM, LlamaTokenizer

tokenizer = LlamaTokenizer.from_pretrained("/output/path")
model = LlamaForCausalLM.from_pretrained("/output/path")
"""
    names: dict[str, object] = {}
    exec(snippet.replace("/output/path", str(output_path)), names)
    tokenizer, model = names["tokenizer"], names["model"]
    assert isinstance(tokenizer, LlamaTokenizer)
    assert isinstance(model, LlamaForCausalLM)
    inputs = tokenizer(TEXT, return_tensors="pt")
    assert model(**inputs).logits.shape == (1, inputs["input_ids"].shape[1], VOCAB)


def test_the_tip_of_grouped_query_attention() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    output = LlamaModel(LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=2))(torch.tensor([[1, 2, 3]]))
    assert output.past_key_values[0][0].shape == (1, 2, 3, 8)  # cached once per key-value head


def test_the_tip_of_pretraining_tp(output_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(output_path, dtype="bfloat16")
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        exact = LlamaForCausalLM.from_pretrained(output_path)(ids).logits
        whole = model(ids).logits
        model.config.pretraining_tp = 2
        sliced = model(ids).logits
    assert not torch.equal(sliced, whole)  # other roundings, as tensor-parallel training had
    assert float((sliced.float() - exact).abs().max()) < 2 * float((whole.float() - exact).abs().max())


def test_the_tip_of_the_padding_token() -> None:
    tokenizer = LlamaTokenizer(tiny_tokenizer().files()["tokenizer.model"])
    assert tokenizer.pad_token is None  # the original has no padding token
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 1
    model = llama()
    model.resize_token_embeddings(VOCAB + 1)
    model.config.pad_token_id = VOCAB
    assert not model.get_input_embeddings()(torch.tensor([VOCAB])).any()


def test_passing_the_padding_token_when_initialising_makes_its_row_zero() -> None:
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=39)
    assert not LlamaModel(config).embed_tokens(torch.tensor([39])).any()


def test_the_quirk_of_the_first_token(output_path: Path) -> None:
    """A first token that starts a word gets no prefix space: decode whole sequences, not pieces."""
    for tokenizer in (LlamaTokenizer.from_pretrained(output_path), LlamaTokenizerFast.from_pretrained(output_path)):
        ids = tokenizer.encode("circle circle", add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")
        assert not tokenizer.decode(ids[:1]).startswith(" ")
        assert tokenizer.decode(ids) == "circle circle"


TOKENIZER_METHODS = (
    "build_inputs_with_special_tokens",
    "get_special_tokens_mask",
    "create_token_type_ids_from_sequences",
    "save_vocabulary",
)
DOCUMENTED = [(LlamaTokenizer, TOKENIZER_METHODS), (LlamaTokenizerFast, (*TOKENIZER_METHODS, "update_post_processor"))]


@pytest.mark.parametrize(("cls", "methods"), DOCUMENTED)
def test_the_methods_of_the_tokenizers_are_documented(cls: type, methods: tuple[str, ...]) -> None:
    assert all(getattr(cls, method).__doc__ for method in methods)


@pytest.mark.parametrize("cls", [LlamaTokenizer, LlamaTokenizerFast])
def test_the_methods_of_the_tokenizers(cls: type[LlamaTokenizer | LlamaTokenizerFast], output_path: Path, tmp_path: Path) -> None:
    tokenizer = cls.from_pretrained(output_path)
    assert tokenizer.build_inputs_with_special_tokens([5, 6], [7]) == [1, 5, 6, 1, 7]
    assert tokenizer.get_special_tokens_mask([5, 6], [7]) == [1, 0, 0, 1, 0]
    assert tokenizer.get_special_tokens_mask([1, 5, 0, 2], already_has_special_tokens=True) == [1, 0, 1, 1]
    assert tokenizer.create_token_type_ids_from_sequences([5, 6], [7]) == [0, 0, 0, 1, 1]
    (path,) = tokenizer.save_vocabulary(str(tmp_path), "my")
    assert Path(path) == tmp_path / "my-tokenizer.model"
    assert LlamaTokenizer(path).encode(TEXT) == tokenizer.encode(TEXT)


def test_update_post_processor(output_path: Path) -> None:
    tokenizer = LlamaTokenizerFast.from_pretrained(output_path)
    tokenizer.add_eos_token = True
    tokenizer.update_post_processor()
    assert tokenizer(TEXT)["input_ids"][-1] == tokenizer.eos_token_id


def test_every_class_of_the_page_is_a_name_of_the_package() -> None:
    for name in ("LlavaConfig", "LlamaTokenizer", "LlamaTokenizerFast", "LlamaModel", "LlamaForCausalLM", "LlavaLlamaForCausalLM"):
        assert getattr(llavakit, name).__doc__
    for cls in (LlamaModel, LlamaForCausalLM, LlavaLlamaForCausalLM):
        assert cls.forward.__doc__


def test_llava_config_and_llama_model_of_each_family(family: Path) -> None:
    model = LlavaLlamaForCausalLM.from_pretrained(family)
    config = model.config
    assert LlavaConfig.from_dict(config.to_dict()) == config
    output = LlamaModel(config)(torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=True, return_dict=True)
    assert output.last_hidden_state.shape == (1, 3, config.text_config.hidden_size)
    assert len(output.hidden_states) == len(output.attentions) + 1 == config.text_config.num_hidden_layers + 1


def test_tokenizers_of_each_family(family: Path) -> None:
    slow, fast = LlamaTokenizer.from_pretrained(family), LlamaTokenizerFast.from_pretrained(family)
    assert slow.encode(TEXT) == fast.encode(TEXT)
    assert slow.convert_tokens_to_ids("<image>") == fast.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    assert slow.pad_token_id == fast.pad_token_id == PAD_TOKEN


def test_llava_forward_of_each_family(family: Path) -> None:
    model, processor = LlavaLlamaForCausalLM.from_pretrained(family), LlavaProcessor.from_pretrained(family)
    picture = Image.new("RGB", (40, 90), (200, 30, 30))
    inputs = processor(images=picture, text=f"USER: <image>\n{TEXT} ASSISTANT:")
    output = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100))
    assert output.logits.shape == (*inputs["input_ids"].shape, VOCAB)
    assert output.loss.isfinite()
    sizes = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
    pictures = gather(model.config, pixel_values=inputs["pixel_values"], **sizes)
    assert pictures is not None
    assert inputs["input_ids"].eq(IMAGE_TOKEN).sum() == sum(pictures.counts)
    assert model(torch.tensor([[1, 5, 6]])).logits.shape == (1, 3, VOCAB)  # text alone
