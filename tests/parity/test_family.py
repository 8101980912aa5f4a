"""The whole family against transformers: decoders with scaled positions, biases and windows; towers; pictures cut by their size.

Tolerances as in test_models: float32 logits reach about 30 and differ by up to 3e-5 from the order of sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit.checkpoint.load import load_config
from llavakit.geometry import num_image_tokens
from llavakit.model.llava_config import LlavaConfig
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlavaLlamaForCausalLM
from llavakit.pretrained.pictures import gather
from tests.tiny import (
    DECODER_KINDS,
    FAMILIES,
    IMAGE_TOKEN,
    SIDE,
    copy_weights,
    decoder_config,
    family_config,
    hf_decoder,
    hf_family,
    scale_weights,
)

LOGITS = 1e-4
SIZES = ((28, 28), (40, 100), (300, 77))  # (height, width) of the pictures


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach() - expected.detach()).abs().max())


def draw_ids(seed: int, length: int = 24) -> Tensor:
    return torch.randint(3, IMAGE_TOKEN, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_decoders_equal_transformers_at_every_position(kind: str) -> None:
    config = decoder_config(kind)
    oracle = hf_decoder(config, seed=3)
    ours = copy_weights(oracle, LlamaForCausalLM(config))
    ids, mask = draw_ids(3), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = oracle(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        found = ours(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert worst(found.logits, expected.logits) < LOGITS
    for name in ("hidden_states", "attentions"):
        assert max(worst(one, other) for one, other in zip(found[name], expected[name], strict=True)) < LOGITS


@pytest.mark.parametrize("kind", [kind for kind in DECODER_KINDS if kind != "rope-dynamic"])
def test_decoders_generate_what_transformers_does(kind: str) -> None:
    config = decoder_config(kind)
    oracle = hf_decoder(config, seed=4)
    ours = copy_weights(oracle, LlamaForCausalLM(config))
    ids = draw_ids(4)
    expected = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, pad_token_id=0), expected)


def given_of(config: LlavaConfig, seed: int, **sizes: Any) -> dict[str, Any]:
    """Two rows with three pictures: the second and third share a row; shorter prompts are padded on the left."""
    tiles = [torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed + count)) for count in sizes["counts"]]
    pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True) if sizes["is_next"] else torch.cat(tiles)
    extra = {"image_sizes": torch.tensor(SIZES)} if sizes["is_next"] else {}
    pictures = gather(config, pixel_values=pixels, **extra)
    assert pictures is not None
    first, second, third = pictures.counts
    text = draw_ids(seed, 12)
    slots = [[IMAGE_TOKEN] * count for count in (first, second, third)]
    rows = [[*text[0, :4], *slots[0], *text[0, 4:]], [*slots[1], *text[1, :7], *slots[2], *text[1, 7:]]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + [int(index) for index in row] for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, **extra}


def draw_given(name: str, config: LlavaConfig, seed: int) -> dict[str, Any]:
    is_next = FAMILIES[name][2]
    counts = (3, 3, 4) if is_next else (1, 1, 1)  # base tile and the pinpoint that suits the size
    return given_of(config, seed, counts=counts, is_next=is_next)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_equals_transformers_at_every_position(name: str) -> None:
    config = family_config(name)
    oracle = hf_family(config, seed=5)
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(config))
    given = draw_given(name, config, 5)
    with torch.no_grad():
        expected, found = oracle(**given), ours(**given)
    assert float(expected.logits.abs().max()) > 3
    assert worst(found.logits, expected.logits) < LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_generates_what_transformers_does(name: str) -> None:
    config = family_config(name)
    oracle = hf_family(config, seed=6)
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(config))
    given = draw_given(name, config, 6)
    expected = oracle.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(**given, max_new_tokens=8, pad_token_id=0), expected)


@pytest.mark.parametrize("layers", [[-1, -3], [0, 2], [1]])
def test_features_of_several_layers_equal_transformers(layers: list[int]) -> None:
    config = family_config("1.5")
    config.vision_feature_layer = layers
    oracle = hf_family(config, seed=7)
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(config))
    given = draw_given("1.5", config, 7)
    with torch.no_grad():
        assert worst(ours(**given).logits, oracle(**given).logits) < LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_either_side_loads_what_the_other_saves(name: str, tmp_path: Path) -> None:
    config = family_config(name)
    oracle = hf_family(config, seed=8)
    given = draw_given(name, config, 8)
    oracle.save_pretrained(tmp_path / "theirs")
    ours = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(oracle).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(load_config(tmp_path / "ours")) is type(config)
    with torch.no_grad():
        expected = oracle(**given).logits
        assert worst(ours(**given).logits, expected) < LOGITS
        assert torch.equal(again(**given).logits, expected)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "rope-llama3", "rope-linear", "biases"])
def test_either_side_loads_decoders_that_the_other_saves(kind: str, tmp_path: Path) -> None:
    config = decoder_config(kind)
    oracle = hf_decoder(config, seed=9)
    oracle.save_pretrained(tmp_path / "theirs")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(oracle).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    ids = draw_ids(9)
    with torch.no_grad():
        expected = oracle(input_ids=ids).logits
        assert worst(ours(input_ids=ids).logits, expected) < LOGITS
        assert torch.equal(again(input_ids=ids).logits, expected)


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu", "identity"])
def test_other_projectors_are_their_formulas(projector: str) -> None:
    config = family_config("1.5")
    if projector == "identity":
        config.vision_config.hidden_size = config.text_config.hidden_size
    config.mm_projector_type = projector
    model = scale_weights(LlavaLlamaForCausalLM(config), 1)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    h = model.vision_tower.features(pixels, depths=(2,), keep_cls=False)
    weights = dict(model.multi_modal_projector.named_parameters())
    for index in range(1, len(weights) // 2 + 1):
        h = torch.nn.functional.gelu(h) if index > 1 else h
        h = h @ weights[f"linear_{index}.weight"].T + weights[f"linear_{index}.bias"]
    assert worst(model.encode_images(pixels), h.flatten(0, 1)) < 1e-5
    assert sum(num_image_tokens(config.image_grid) for _ in pixels) == h.shape[0] * h.shape[1]
