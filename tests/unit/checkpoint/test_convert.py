"""Original LLaVA's folders: loaded directly, converted both ways bit for bit, answered alike in every layout."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llavakit import LLM, Conversation, LlamaForCausalLM, LlavaLlamaForCausalLM, LlavaProcessor, SamplingParams
from llavakit.checkpoint.convert import Conversion, convert
from llavakit.checkpoint.load import load_config
from llavakit.checkpoint.parts import Sources
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.decode import decode_image
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.folders import assert_same, edit_json, tensors_of
from tests.original_folders import KINDS, OriginalFolder, make_original
from tests.originals import original_ids, original_prompt
from tests.tiny import NUM_PIECES, llava, tiny_processor, tiny_tokenizer

PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 70, 30))
GREEDY = SamplingParams(max_tokens=8)


def answer(folder: Path, **options: Any) -> Sequence[int]:
    llm = LLM(folder, device="cpu", **options)
    ids: Sequence[int] = llm.chat(Conversation.ask("what is there?", PICTURE), GREEDY).ids
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_original_folders_load_as_they_are(tmp_path: Path, kind: str) -> None:
    original = make_original(tmp_path, kind)
    model = LlavaLlamaForCausalLM.from_pretrained(original.path)
    assert_same(dict(model.named_parameters()), dict(original.model.named_parameters()))
    assert model.config.image_token_index is None  # -200 stands for a picture
    assert model.config.merge == original.model.config.merge


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pickled", [False, True])
def test_every_layout_gives_the_same_answer(tmp_path: Path, kind: str, pickled: bool) -> None:
    original = make_original(tmp_path, kind, pickled=pickled)
    expected = answer(original.path, allow_pickle=pickled)
    convert(original.path, tmp_path / "hf", Conversion(sources=Sources(allow_pickle=pickled)))
    assert answer(tmp_path / "hf") == expected
    convert(tmp_path / "hf", tmp_path / "back", Conversion(to="original"))
    assert answer(tmp_path / "back") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    original = make_original(tmp_path, kind, tower_inside=True)
    convert(original.path, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", Conversion(to="original"))
    assert_same(tensors_of(tmp_path / "back"), tensors_of(original.path))
    convert(tmp_path / "back", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "hf"))
    first, second = (load_config(folder) for folder in (original.path, tmp_path / "back"))
    assert first.to_original_dict() == second.to_original_dict()
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "v1"])  # it knows no projector of one layer
def test_the_oracle_agrees_with_what_is_written(tmp_path: Path, kind: str) -> None:
    import transformers

    original = make_original(tmp_path, kind)
    convert(original.path, tmp_path / "hf")
    processor = LlavaProcessor.from_pretrained(tmp_path / "hf")
    name = "LlavaNextForConditionalGeneration" if "1.6" in kind else "LlavaForConditionalGeneration"
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    inputs = processor([decode_image(PICTURE)], "USER: <image>\nwhat is there? ASSISTANT:")
    ours = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert len(processor.tokenizer) <= ours.config.text_config.vocab_size
    assert ours.config.text_config.vocab_size % 64 == 0


def test_new_rows_are_the_mean_and_old_ones_keep_their_bits(tmp_path: Path) -> None:
    original = make_original(tmp_path, "v1.5")
    convert(original.path, tmp_path / "hf")
    table = tensors_of(tmp_path / "hf")["language_model.model.embed_tokens.weight"]
    old = original.model.get_input_embeddings().weight
    assert torch.equal(table[:NUM_PIECES], old)
    torch.testing.assert_close(table[NUM_PIECES:], old.mean(0, keepdim=True).expand(table.shape[0] - NUM_PIECES, -1))
    config = load_config(tmp_path / "hf").to_dict()
    assert (config["image_token_index"], config["original_vocab_size"]) == (NUM_PIECES, NUM_PIECES)


def test_a_pad_token_is_added_where_there_is_none(tmp_path: Path) -> None:
    original = make_original(tmp_path, "v1.6")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = original.path / name
        values = {key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}
        path.write_text(json.dumps(values))
    edit(original.path, pad_token_id=None)
    convert(original.path, tmp_path / "hf")
    processor, config = LlavaProcessor.from_pretrained(tmp_path / "hf"), load_config(tmp_path / "hf")
    assert (processor.tokenizer.pad_token_id, config.pad_token_id) == (NUM_PIECES + 1, NUM_PIECES + 1)
    assert answer(original.path) == answer(tmp_path / "hf")


def make_old(folder: Path, *tokens: str, **values: Any) -> Path:
    """Write a v1 folder whose tokenizer has further tokens, each with a row."""
    original = make_original(folder, "v1").path
    edit(original, vocab_size=NUM_PIECES + len(tokens), **values)
    weights, tables = tensors_of(original), ("model.embed_tokens.weight", "lm_head.weight")
    rows = torch.randn(len(tokens), 64, generator=torch.Generator().manual_seed(6))
    save_file({**weights, **{name: torch.cat((weights[name], rows)) for name in tables}}, original / "model.safetensors")
    added = {token: NUM_PIECES + place for place, token in enumerate(tokens)}
    LlamaTokenizer(tiny_tokenizer().files()["tokenizer.model"], added_tokens=added).save_pretrained(original)
    return original


def test_the_patch_token_of_old_folders_is_only_a_row(tmp_path: Path) -> None:
    """LLaVA adds <im_patch> where mm_use_im_patch_token is set or absent; no prompt holds it, and <image> comes behind it."""
    original = make_old(tmp_path, "<im_patch>")
    values = json.loads((original / "config.json").read_text())
    del values["mm_use_im_patch_token"]
    (original / "config.json").write_text(json.dumps(values))
    convert(original, tmp_path / "hf")
    assert answer(original) == answer(tmp_path / "hf")
    assert load_config(tmp_path / "hf").to_dict()["image_token_index"] == NUM_PIECES + 1
    convert(tmp_path / "hf", tmp_path / "back", Conversion(to="original"))
    back = tensors_of(tmp_path / "back")
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    assert all(torch.equal(back[name], tensors_of(original)[name]) for name in tables)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_use_im_patch_token"] is True


def test_tokens_around_pictures_are_there_in_every_layout(tmp_path: Path) -> None:
    tokens = ("<im_patch>", "<im_start>", "<im_end>")
    original = make_old(tmp_path, *tokens, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    convert(original, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", Conversion(to="original"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_use_im_start_end"] is True
    asked = Conversation.ask("what is there?", PICTURE)
    text = original_prompt("v1", [("<im_start><image><im_end>\nwhat is there?", None)])
    for folder in (original, tmp_path / "hf", tmp_path / "back"):
        llm = LLM(folder, device="cpu")
        assert isinstance(llm.processor, LlavaProcessor)
        ids, image = llm.processor.prompt(asked).ids, llm.processor.image_token_id
        once = [token for place, token in enumerate(ids) if token != image or ids[place - 1] != image]
        words = load_tokenizer(original)
        assert isinstance(words, LlamaTokenizer)
        assert once == original_ids(words, text, image)
    assert answer(original) == answer(tmp_path / "hf") == answer(tmp_path / "back")
    template = (tmp_path / "hf" / "chat_template.jinja").read_text()
    assert "<im_start><image><im_end>\\n" in template


def test_what_the_weights_were_trained_with_is_written(tmp_path: Path) -> None:
    convert(make_original(tmp_path, "v1.5").path, tmp_path / "hf")
    processor = LlavaProcessor.from_pretrained(tmp_path / "hf")
    assert (processor.template.name, processor.image_processor.aspect, processor.preprocessing_note) == ("v1", "pad", None)
    convert(make_original(tmp_path / "next", "v1.6").path, tmp_path / "next hf")
    assert LlavaProcessor.from_pretrained(tmp_path / "next hf").image_processor.aspect == "anyres"


def test_a_llava_hf_folder_becomes_an_original_one_and_comes_back(tmp_path: Path) -> None:
    """Its vocabulary has rows for <image> and <pad> already, and keeps them."""
    llava().save_pretrained(tmp_path / "hf", processor=tiny_processor())
    convert(tmp_path / "hf", tmp_path / "original", Conversion(to="original"))
    assert answer(tmp_path / "original") == answer(tmp_path / "hf")
    convert(tmp_path / "original", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "hf"))


def test_the_language_model_alone(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM as HfLlama

    original = make_original(tmp_path, "v1.5")
    convert(original.path, tmp_path / "text", Conversion(to="text", dtype=torch.bfloat16))
    ids = torch.tensor([[1, 5, 6, 7]])
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "text")
    theirs = HfLlama.from_pretrained(tmp_path / "text", dtype=torch.float32)
    assert ours.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(ours.float()(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    original = make_original(tmp_path, "v1.6")
    names = convert(original.path, tmp_path / "hf", Conversion(is_dry=True))
    assert names == [name for name, _ in original.model.named_parameters()]
    assert not (tmp_path / "hf").exists()


def edit(folder: Path, **values: Any) -> None:
    edit_json(folder / "config.json", **values)


def test_a_tower_that_would_not_be_used_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_original(tmp_path, "v1.6")
    convert(made.path, tmp_path / "hf", Conversion(sources=Sources(vision_tower=tmp_path / "tower")))
    assert "holds its own vision tower; the weights of" in caplog.text
    with pytest.raises(CheckpointError, match="holds its own vision tower, so /some/tower would not be used; leave it out"):
        load_config(tmp_path / "hf", Sources(vision_tower="/some/tower"))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_siglip_without_its_last_layer(tmp_path: Path, layer: int, pickled: bool) -> None:
    """LLaVA-NeXT deletes the last layer before it trains, and writes config.json as if it were there."""
    made = make_original(tmp_path, "interleave", tower_inside=True, pickled=pickled)
    described = {**made.model.config.vision_config.to_dict(), "num_hidden_layers": 4}
    (tmp_path / "tower" / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": described}))
    edit(made.path, mm_vision_select_layer=layer)
    sources = Sources(allow_pickle=pickled)
    config = load_config(made.path, sources)
    assert isinstance(config, LlavaConfig)
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer, config.feature_depths) == (3, -1, (3,))
    convert(made.path, tmp_path / "hf", Conversion(sources=sources))
    convert(tmp_path / "hf", tmp_path / "back", Conversion(to="original"))
    expected = dict(made.model.named_parameters())
    assert_same(dict(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "back").named_parameters()), expected)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 5}, {"num_hidden_layers": 4, "layer": -3}])
def test_a_siglip_without_more_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    made = make_original(tmp_path, "interleave", tower_inside=True)
    described = {**made.model.config.vision_config.to_dict(), "num_hidden_layers": change["num_hidden_layers"]}
    (tmp_path / "tower" / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": described}))
    edit(made.path, mm_vision_select_layer=change.get("layer", -2))
    with pytest.raises(CheckpointError, match=r"missing vision_tower\.vision_model\.encoder\.layers\.3"):
        LlavaLlamaForCausalLM.from_pretrained(made.path)


NARROW = {"image_size": 28, "patch_size": 7}
FAULTS: dict[str, tuple[Callable[[OriginalFolder], object], str]] = {
    "no tower": (lambda made: edit(made.path, mm_vision_tower="/no/such/tower"), "--vision-tower names a folder"),
    "a tower of a strange kind": (lambda made: edit(made.tower or made.path, vision_config={"model_type": ["x"]}), "is no tower"),
    "a tower of an endless name": (lambda made: edit(made.path, mm_vision_tower="x" * 5000), "cannot be opened: File name too long"),
    "an unnamed tower": (lambda made: edit(made.path, mm_vision_tower=7), "says? which tower it is|names no mm_vision_tower"),
    "another tower": (lambda made: edit(made.tower or made.path, vision_config={**NARROW, "hidden_size": 48}), "mm_hidden_size"),
    "another projector": (lambda made: edit(made.path, mm_projector_type="mlp3x_gelu"), "missing multi_modal_projector.linear_3"),
    "no tokens around pictures": (lambda made: edit(made.path, mm_use_im_start_end=True), "its tokenizer lacks <im_start> and <im_end>"),
    "another ratio": (lambda made: edit(made.path, image_aspect_ratio="golden"), "image_aspect_ratio='golden'"),
    "several scales": (lambda made: edit(made.path, s2=True), "several scales"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    action, told = FAULTS[kind]
    made = make_original(tmp_path / "made", "v1.5")
    action(made)
    with pytest.raises(CheckpointError, match=told):
        convert(made.path, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_pickles_are_read_only_when_they_may_be(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1.6", pickled=True)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        convert(made.path, tmp_path / "hf")
    convert(made.path, tmp_path / "hf", Conversion(sources=Sources(allow_pickle=True)))


def test_another_tower_may_be_named(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1.5")
    edit(made.path, mm_vision_tower="openai/clip-vit-large-patch14-336")
    expected = dict(made.model.named_parameters())
    assert_same(dict(LlavaLlamaForCausalLM.from_pretrained(made.path, vision_tower=made.tower).named_parameters()), expected)
    convert(made.path, tmp_path / "hf", Conversion(sources=Sources(vision_tower=made.tower)))
    assert answer(made.path, vision_tower=made.tower) == answer(tmp_path / "hf")


def test_a_language_model_stays_one(tmp_path: Path) -> None:
    convert(make_original(tmp_path, "v1.5").path, tmp_path / "text", Conversion(to="text"))
    convert(tmp_path / "text", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "text"))
    with pytest.raises(ConfigError, match="--to hf and gguf can hold it"):
        convert(tmp_path / "text", tmp_path / "no", Conversion(to="original"))


def test_what_is_converted_says_what_it_was_made_of(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1.5")
    assert made.tower is not None
    (made.path / "LICENSE").write_text("the model's terms")
    (made.tower / "LICENSE").write_text("the tower's terms")
    convert(made.path, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "- original: [license](LICENSE)\n- tower: [license](LICENSE-2)\n" in card
    assert {path.read_text() for path in (tmp_path / "hf").glob("LICENSE*")} == {"the model's terms", "the tower's terms"}
    assert '"do_pad": true' in card  # how the weights were trained
    convert(tmp_path / "hf", tmp_path / "back", Conversion(to="original"))
    assert "in original LLaVA's layout" in (tmp_path / "back" / "README.md").read_text()
    assert len(list((tmp_path / "back").glob("LICENSE*"))) == 2


def test_tokens_behind_image_keep_their_rows(tmp_path: Path) -> None:
    model = llava()
    processor = tiny_processor()
    assert isinstance(processor.tokenizer, LlamaTokenizer)
    processor.tokenizer.add_tokens(["<extra>"], special_tokens=True)
    extra = processor.tokenizer.find_token("<extra>")
    assert extra is not None
    assert extra > processor.image_token_id
    model.save_pretrained(tmp_path / "hf", processor=processor)
    convert(tmp_path / "hf", tmp_path / "original", Conversion(to="original"))
    convert(tmp_path / "original", tmp_path / "again")
    for folder in ("original", "again"):
        assert load_tokenizer(tmp_path / folder).find_token("<extra>") == extra
    assert answer(tmp_path / "original") == answer(tmp_path / "hf")


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_language_models_own_chat_template_comes_along(tmp_path: Path, file: str) -> None:
    template = "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    convert(make_original(tmp_path, "v1.5").path, tmp_path / "text", Conversion(to="text"))
    v1 = (tmp_path / "text" / "chat_template.jinja").read_text()
    assert "USER: " in v1  # what the LLaVA was trained with
    (tmp_path / "text" / "chat_template.jinja").unlink()
    if file.endswith(".jinja"):
        (tmp_path / "text" / file).write_text(template)
    else:
        values = json.loads((tmp_path / "text" / file).read_text())
        (tmp_path / "text" / file).write_text(json.dumps({**values, "chat_template": template}))
    convert(tmp_path / "text", tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == template


def test_top_level_nulls_of_a_llava_hf_config_do_not_reach_the_language_model(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "hf", processor=tiny_processor())
    edit(tmp_path / "hf", eos_token_id=None, bos_token_id=None)
    convert(tmp_path / "hf", tmp_path / "original", Conversion(to="original"))
    values = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (1, 2)


def test_generation_settings_name_no_token_without_a_row(tmp_path: Path) -> None:
    original = make_original(tmp_path, "v1.5").path
    convert(original, tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"pad_token_id": NUM_PIECES + 1, "temperature": 0.5}))
    convert(tmp_path / "hf", tmp_path / "back", Conversion(to="original"))
    values = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert values == {"pad_token_id": 0, "temperature": 0.5}


def test_a_card_that_cannot_be_read_states_nothing(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1.5")
    (made.path / "README.md").write_bytes(b"---\nlicense: mit\n\xff---\n")
    convert(made.path, tmp_path / "hf")
    assert "- original: Not stated" in (tmp_path / "hf" / "README.md").read_text()
