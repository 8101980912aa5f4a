"""A fresh LLaVA of a language model and a tower: their own bits, a projector as torch draws it, files that everyone loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from llavakit import LLM, Conversation, LlavaLlamaForCausalLM, LlavaProcessor, SamplingParams
from llavakit.checkpoint.convert import Conversion, Output, convert
from llavakit.checkpoint.fresh import Fresh
from llavakit.checkpoint.load import load_config
from llavakit.checkpoint.parts import Sources
from llavakit.cli.main import run
from llavakit.errors import CheckpointError, ConfigError
from llavakit.processing.chat import TEMPLATES
from llavakit.processing.decode import decode_image
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.folders import edit_json, tensors_of
from tests.meta_files import MetaLlama
from tests.tiny import NUM_PIECES, SIDE, decoder_config, hf_decoder, llama3_tokenizer_folder, scale_weights, tiny_tokenizer

PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 70, 30))
SHAPE = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 7}
MEAN = [0.25, 0.5, 0.75]


def clip_config() -> Any:
    """Leave out of the file what CLIP has by default: 12 heads."""
    return transformers.CLIPVisionConfig(**SHAPE, num_attention_heads=12)


def whole(kind: str) -> Any:
    text = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    if kind == "clip":
        return transformers.CLIPModel(transformers.CLIPConfig(vision_config=clip_config().to_dict(), text_config=text))
    vision = {**SHAPE, "num_attention_heads": 4}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))


TOWERS: dict[str, Callable[[], Any]] = {
    "a whole CLIP": lambda: whole("clip"),
    "CLIP's tower": lambda: transformers.CLIPVisionModel(clip_config()),
    "a whole SigLIP": lambda: whole("siglip"),
    "SigLIP's tower": lambda: whole("siglip").vision_model,
}


def save_tower(folder: Path, kind: str = "CLIP's tower", **images: Any) -> Path:
    scale_weights(TOWERS[kind](), 1).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    sizes: dict[str, Any] = {"size": size} if "SigLIP" in kind else {"size": {"shortest_edge": SIDE}, "crop_size": size}
    name = "SiglipImageProcessor" if "SigLIP" in kind else "CLIPImageProcessor"
    values = {"image_processor_type": name, "do_center_crop": "CLIP's" in kind or "whole CLIP" in kind, **sizes, **images}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def save_decoder(folder: Path, kind: str = "llama", **values: Any) -> Path:
    config = decoder_config(kind)
    config.restructure(**{"vocab_size": NUM_PIECES, **values})
    hf_decoder(config).save_pretrained(folder)
    LlamaTokenizer(tiny_tokenizer().files()["tokenizer.model"]).save_pretrained(folder)
    return folder


def build(tmp_path: Path, tower: str = "CLIP's tower", decoder: str = "llama", *, images: dict[str, Any] | None = None, **how: Any) -> Path:
    sources = Sources(vision_tower=save_tower(tmp_path / "tower", tower, **({} if images is None else images)))
    convert(save_decoder(tmp_path / "decoder", decoder), tmp_path / "fresh", Conversion(sources=sources, **how))
    return tmp_path / "fresh"


@pytest.mark.parametrize("tower", TOWERS)
def test_parts_keep_their_bits_and_transformers_agrees(tmp_path: Path, tower: str) -> None:
    """The tower's features and the logits are those of transformers; nothing but the text side and SigLIP's head is left out."""
    fresh, parts = build(tmp_path, tower, images={"image_mean": MEAN}), tensors_of(tmp_path / "decoder")
    made = tensors_of(fresh)
    for name, weight in parts.items():
        assert torch.equal(made[f"language_model.{name}"][: weight.shape[0]], weight)
    seen = {name.removeprefix("vision_model."): weight for name, weight in tensors_of(tmp_path / "tower").items()}
    for name, weight in made.items():
        if name.startswith("vision_tower."):
            assert torch.equal(seen[name.removeprefix("vision_tower.vision_model.")], weight)
    processor = LlavaProcessor.from_pretrained(fresh)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(fresh, attn_implementation="eager").eval()
    inputs = processor([decode_image(PICTURE)], "<image>a red circle")
    with torch.no_grad():
        ours = LlavaLlamaForCausalLM.from_pretrained(fresh)(**inputs)
        torch.testing.assert_close(ours.logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert list(processor.image_processor.mean) == MEAN
    assert processor.image_processor.aspect == ("stretch" if "SigLIP" in tower else "crop")
    assert (load_config(fresh).to_dict()["vision_feature_select_strategy"] == "full") == ("SigLIP" in tower)


@pytest.mark.parametrize(("kind", "depth"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)])
def test_the_projector_is_what_torch_draws(tmp_path: Path, kind: str, depth: int) -> None:
    sources = Sources(vision_tower=save_tower(tmp_path / "tower"))
    narrow: dict[str, Any] = {"hidden_size": 48} if depth == 0 else {}
    save_decoder(tmp_path / "decoder", **narrow)
    convert(tmp_path / "decoder", tmp_path / "fresh", Conversion(sources=sources, fresh=Fresh(projector=kind, seed=7)))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = [nn.Linear(48 if index == 0 else 64, 64) for index in range(depth)]
    made = {name: weight for name, weight in tensors_of(tmp_path / "fresh").items() if "projector" in name}
    assert len(made) == 2 * depth
    for index, layer in enumerate(expected):
        assert torch.equal(made[f"multi_modal_projector.linear_{index + 1}.weight"], layer.weight)
        assert torch.equal(made[f"multi_modal_projector.linear_{index + 1}.bias"], layer.bias)


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
def test_other_language_models(tmp_path: Path, decoder: str) -> None:
    fresh = build(tmp_path, decoder=decoder)
    assert load_config(fresh).to_dict()["text_config"]["model_type"] == decoder
    assert LLM(fresh, device="cpu").chat(Conversation.ask("", PICTURE), SamplingParams(max_tokens=3)).ids


def test_an_adapters_language_model(tmp_path: Path) -> None:
    folder, name = tmp_path / "adapter", "model.layers.1.self_attn.q_proj"
    folder.mkdir()
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(save_decoder(tmp_path / "decoder"))}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    factors = {f"{name}.lora_A.weight": torch.ones(1, 64), f"{name}.lora_B.weight": torch.ones(64, 1)}
    save_file({f"base_model.model.{key}": weight for key, weight in factors.items()}, folder / "adapter_model.safetensors")
    convert(folder, tmp_path / "fresh", Conversion(sources=Sources(vision_tower=save_tower(tmp_path / "tower"))))
    made, plain = tensors_of(tmp_path / "fresh"), tensors_of(tmp_path / "decoder")
    assert torch.equal(made[f"language_model.{name}.weight"], plain[f"{name}.weight"] + 1)


def test_metas_own_files_in_half_precision(tmp_path: Path) -> None:
    MetaLlama(num_files=2, vocab_size=NUM_PIECES, dtype=torch.bfloat16).save(tmp_path / "meta")
    sources = Sources(vision_tower=save_tower(tmp_path / "tower"), allow_pickle=True)
    convert(tmp_path / "meta", tmp_path / "fresh", Conversion(sources=sources))
    convert(tmp_path / "meta", tmp_path / "text", Conversion(sources=Sources(allow_pickle=True)))
    made = tensors_of(tmp_path / "fresh")
    for name, weight in tensors_of(tmp_path / "text").items():
        assert torch.equal(made[f"language_model.{name}"][: weight.shape[0]], weight)
    assert made["multi_modal_projector.linear_1.bias"].dtype == torch.bfloat16
    assert made["vision_tower.vision_model.post_layernorm.bias"].dtype == torch.float32


def test_both_layouts_give_the_same_answer(tmp_path: Path) -> None:
    fresh = build(tmp_path, fresh=Fresh(template=TEMPLATES["v1"]))
    convert(tmp_path / "decoder", tmp_path / "original", Conversion(to="original", sources=Sources(vision_tower=tmp_path / "tower")))
    ask = Conversation.ask("what is there?", PICTURE)
    options: dict[str, Any] = {"device": "cpu", "template": "v1", "preprocess": "pad"}
    llms = [LLM(folder, **options) for folder in (fresh, tmp_path / "original")]
    first, second = (llm.chat(ask, SamplingParams(max_tokens=6)).ids for llm in llms)
    assert first == second
    processor = LlavaProcessor.from_pretrained(fresh)
    assert (processor.template.name, processor.image_processor.aspect) == ("v1", "pad")
    values = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (values["vocab_size"], values["mm_projector_type"], values["image_aspect_ratio"]) == (NUM_PIECES, "mlp2x_gelu", None)
    assert json.loads((tmp_path / "original" / "processor_config.json").read_text())["llavakit_template"] == "plain"


@pytest.mark.parametrize("kept", [(), ("<image>", "<pad>")])
def test_fast_tokenizers(tmp_path: Path, kept: tuple[str, ...]) -> None:
    """Llama-3's has neither <image> nor a pad token, and no rows to spare for them."""
    words = llama3_tokenizer_folder(tmp_path / "words")
    document = json.loads((words / "tokenizer.json").read_text())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in {"<image>", "<pad>"} - {*kept}]
    settings = json.loads((words / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name != "added_tokens_decoder" and (kept or name != "pad_token")}
    save_decoder(tmp_path / "decoder", vocab_size=document["added_tokens"][-1]["id"] + 1)
    for path in (tmp_path / "decoder").glob("*token*"):
        path.unlink()
    (tmp_path / "decoder" / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "decoder" / "tokenizer_config.json").write_text(json.dumps(settings))
    sources, answers = Sources(vision_tower=save_tower(tmp_path / "tower")), []
    layouts: tuple[Output, ...] = ("hf", "original")
    for layout in layouts:
        convert(tmp_path / "decoder", tmp_path / layout, Conversion(to=layout, sources=sources))
        answers.append(LLM(tmp_path / layout, device="cpu").chat(Conversation.ask("", PICTURE), SamplingParams(max_tokens=5)).ids)
    assert answers[0] == answers[1]


def test_original_folders_cannot_state_other_colours(tmp_path: Path) -> None:
    build(tmp_path, images={"image_mean": MEAN})
    with pytest.raises(ConfigError, match="mean and std"):
        convert(tmp_path / "fresh", tmp_path / "original", Conversion(to="original"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(save_decoder(tmp_path / "decoder")), str(tmp_path / "fresh"), "--vision-tower", str(save_tower(tmp_path / "tower"))]
    assert run(["convert", *folders, "--projector", "linear", "--template", "v1", "--seed", "3"]) == 0
    assert load_config(tmp_path / "fresh").to_dict()["mm_projector_type"] == "linear"
    assert run(["convert", str(tmp_path / "fresh"), str(tmp_path / "again"), "--seed", "3"]) == 2
    assert "for a fresh LLaVA" in capsys.readouterr().err


FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no tower": (lambda tower: edit_json(tower / "config.json", model_type="bert"), {}, "holds a 'bert', which is no tower"),
    "other pictures": (
        lambda tower: edit_json(tower / "preprocessor_config.json", crop_size=21, size=21),
        {},
        "of 21 pixels, the tower takes",
    ),
    "another tower's weights": (lambda tower: edit_json(tower / "config.json", num_hidden_layers=5), {}, "missing vision_tower"),
    "no such projector": (lambda tower: None, {"projector": "cube"}, "mm_projector_type must be"),
    "widths that differ": (lambda tower: None, {"projector": "identity"}, "identity needs features as wide"),
    "another tokenizer's template": (lambda tower: None, {"template": TEMPLATES["qwen"]}, "which the tokenizer lacks"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    action, options, told = FAULTS[kind]
    action(save_tower(tmp_path / "tower"))
    how = Conversion(sources=Sources(vision_tower=tmp_path / "tower"), fresh=Fresh(**options))
    with pytest.raises((CheckpointError, ConfigError), match=told):
        convert(save_decoder(tmp_path / "decoder"), tmp_path / "fresh", how)
    assert not (tmp_path / "fresh").exists()


def test_a_language_model_without_its_table_is_told_apart(tmp_path: Path) -> None:
    decoder, tower = save_decoder(tmp_path / "words"), save_tower(tmp_path / "tower")
    tensors = tensors_of(decoder)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, decoder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing language_model\.model\.embed_tokens\.weight"):
        convert(decoder, tmp_path / "out", Conversion(sources=Sources(vision_tower=tower)))
