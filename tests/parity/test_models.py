"""Our models against transformers' eager path: logits, hidden states, attentions, features, losses, gradients, at every position.

Tolerances: weights have unit scale, logits reach about 30 and products are summed in other orders, so float32 differs by up to
3e-5 there (measured over 60 seeds); 1e-4 leaves a factor of three. A transposed weight or a shifted position is off by more than 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit.model.llava import PackedBatch
from llavakit.ops.attention import Packed
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM
from tests.tiny import (
    IMAGE_TOKEN,
    NUM_IMAGE_TOKENS,
    SIDE,
    VARIANTS,
    Variant,
    copy_weights,
    hf_llama,
    hf_llava,
    llama_config,
    llava_config,
    scale_weights,
)

LOGITS, FEATURES = 1e-4, 1e-5
SEEDS = (0, 1, 2)
PADDINGS = ("none", "right", "left", "both", "middle")
LENGTH = NUM_IMAGE_TOKENS + 14


def variants() -> list[Variant]:
    return [replace(variant, seed=seed, name=f"{variant.name}-{seed}") for variant in VARIANTS for seed in SEEDS]


def padding_mask(kind: str) -> Tensor:
    """Mask of two rows [2, LENGTH]; the first row is always full."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    hidden = {"none": (), "right": (-5, -4, -3, -2, -1), "left": (0, 1, 2), "both": (0, 1, -1), "middle": (LENGTH - 8, LENGTH - 7)}[kind]
    mask[1, list(hidden)] = 0
    return mask


def draw_ids(seed: int, *, images: bool) -> Tensor:
    ids = torch.randint(3, IMAGE_TOKEN, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    if images:
        ids[0, 4 : 4 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
        ids[1, 5 : 5 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
    return ids


def draw_pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach() - expected.detach()).abs().max())


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_llama_equals_transformers_at_every_position(variant: Variant, padding: str) -> None:
    oracle = hf_llama(variant)
    ours = copy_weights(oracle, LlamaForCausalLM(llama_config(variant)))
    given = {"input_ids": draw_ids(variant.seed, images=False), "attention_mask": padding_mask(padding)}
    with torch.no_grad():
        expected = oracle(**given, output_hidden_states=True, output_attentions=True)
        found = ours(**given, output_hidden_states=True, output_attentions=True)
    assert float(expected.logits.abs().max()) > 3
    assert worst(found.logits, expected.logits) < LOGITS
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name])
        assert max(worst(ours_, theirs) for ours_, theirs in zip(found[name], expected[name], strict=True)) < LOGITS


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_llava_equals_transformers_at_every_position(variant: Variant, padding: str) -> None:
    oracle = hf_llava(variant)
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(llava_config(variant)))
    mask, ids, pixels = padding_mask(padding), draw_ids(variant.seed, images=True), draw_pixels(2, variant.seed)
    with torch.no_grad():
        expected = oracle(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        found = ours(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    assert worst(found.logits, expected.logits) < LOGITS


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-1, -2, -4, 1, 3])
def test_image_features_equal_transformers(layer: int, strategy: str) -> None:
    config = llava_config()
    config.vision_feature_layer, config.vision_feature_select_strategy = layer, strategy
    oracle: Any = scale_weights(_oracle_of(config.to_dict()), 3).eval()
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(config))
    pixels = draw_pixels(3)
    with torch.no_grad():
        expected = oracle.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
        assert worst(ours.encode_images(pixels), torch.cat(list(expected.pooler_output))) < FEATURES


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_loss_and_gradients_equal_transformers(variant: Variant) -> None:
    oracle = hf_llava(variant)
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(llava_config(variant)))
    ids, mask, pixels = draw_ids(7, images=True), padding_mask("right"), draw_pixels(2)
    labels = ids.masked_fill((ids == IMAGE_TOKEN) | (mask == 0), IGNORE)
    expected = oracle(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    found = ours(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    found.backward()
    gradients = {name: weight.grad for name, weight in oracle.named_parameters()}
    twin = copy_weights(_gradients_as_weights(oracle, gradients), LlavaLlamaForCausalLM(llava_config(variant)))
    expected_gradients = dict(twin.named_parameters())
    compared = 0
    for name, weight in ours.named_parameters():
        if weight.grad is not None:
            assert worst(weight.grad, expected_gradients[name]) < 1e-4, name
            compared += 1
    assert compared > 40


def test_gradients_are_zero_for_the_pad_row() -> None:
    config = llama_config()
    config.pad_token_id = 5
    model = LlamaForCausalLM(config)
    assert not model.model.embed_tokens.weight[5].any()
    ids = torch.tensor([[5, 6, 7, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert not gradient[5].any()
    assert gradient[6].any()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_greedy_ids_equal_transformers(variant: Variant) -> None:
    oracle = hf_llava(variant)
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(llava_config(variant)))
    ids, mask, pixels = draw_ids(11, images=True), padding_mask("left"), draw_pixels(2, 5)
    expected = oracle.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    found = ours.generate(ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=24, pad_token_id=0)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("eos", [2, 17])
def test_greedy_text_ids_equal_transformers_with_early_ends(eos: int) -> None:
    oracle = hf_llama(VARIANTS[0])
    ours = copy_weights(oracle, LlamaForCausalLM(llama_config(VARIANTS[0])))
    ids = draw_ids(3, images=False)[:, :6]
    plain = ours.generate(ids, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)
    early = int(plain[0, 9])  # an id that this model does produce ends one row before the other
    for end in (eos, early):
        expected = oracle.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)
        assert ours.generate(ids, max_new_tokens=12, eos_token_id=end, pad_token_id=0).tolist() == expected.tolist()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("cut", [1, 5, LENGTH - 1])
def test_a_cached_step_equals_the_whole(variant: Variant, cut: int) -> None:
    ours = copy_weights(hf_llama(variant), LlamaForCausalLM(llama_config(variant)))
    ids = draw_ids(2, images=False)
    with torch.no_grad():
        whole = ours(input_ids=ids).logits
        first = ours(input_ids=ids[:, :cut], use_cache=True)
        second = ours(input_ids=ids[:, cut:], past_key_values=first.past_key_values)
    assert worst(torch.cat((first.logits, second.logits), 1), whole) < LOGITS


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_packed_equals_separate(variant: Variant) -> None:
    ours = copy_weights(hf_llava(variant), LlavaLlamaForCausalLM(llava_config(variant)))
    ids, pixels = draw_ids(4, images=True), draw_pixels(2)
    lengths = (LENGTH, LENGTH - 6)
    rows = [ids[row, :length] for row, length in enumerate(lengths)]
    packed_ids, positions = torch.cat(rows), torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, LENGTH, sum(lengths)], dtype=torch.int32)
    labels = torch.cat([torch.cat((row[1:].masked_fill(row[1:] == IMAGE_TOKEN, IGNORE), torch.tensor([IGNORE]))) for row in rows])
    with torch.no_grad():
        x_TD = ours.embed(packed_ids, ours.encode_images(pixels))
        together = ours.logits(ours.forward_packed(x_TD, positions, Packed(bounds)))
        alone = torch.cat([ours(input_ids=row[None], pixel_values=pixels[i : i + 1]).logits[0] for i, row in enumerate(rows)])
        assert worst(together, alone) < LOGITS
        terms = ours.loss_packed(PackedBatch(packed_ids, labels, positions, bounds, pixels))
    dense = torch.nn.functional.cross_entropy(alone, labels, ignore_index=IGNORE, reduction="sum")
    assert terms.sum.item() == pytest.approx(dense.item(), rel=1e-5)
    assert int(terms.weight) == int((labels != IGNORE).sum())


def test_llama_model_equals_the_decoder_of_the_language_model() -> None:
    oracle = hf_llama(VARIANTS[1])
    bare = LlamaModel(llama_config(VARIANTS[1]))
    bare.load_state_dict(oracle.model.state_dict())
    ids = draw_ids(1, images=False)
    with torch.no_grad():
        assert worst(bare(input_ids=ids).last_hidden_state, oracle.model(input_ids=ids).last_hidden_state) < LOGITS


def test_positions_and_embeddings_may_be_given() -> None:
    oracle = hf_llama(VARIANTS[1])
    ours = copy_weights(oracle, LlamaForCausalLM(llama_config(VARIANTS[1])))
    ids, positions = draw_ids(6, images=False), torch.arange(LENGTH).flip(0).expand(2, -1) + 3
    with torch.no_grad():
        x_BSD = oracle.get_input_embeddings()(ids)
        expected = oracle(inputs_embeds=x_BSD, position_ids=positions).logits
        assert worst(ours(inputs_embeds=x_BSD, position_ids=positions).logits, expected) < LOGITS
        as_tuple = ours(input_ids=ids, position_ids=positions, use_cache=False, return_dict=False)
    assert len(as_tuple) == 1
    assert worst(as_tuple[0], expected) < LOGITS


def test_one_image_id_per_picture_gives_the_run_of_ids() -> None:
    ours = copy_weights(hf_llava(), LlavaLlamaForCausalLM(llava_config()))
    run, pixels = draw_ids(8, images=True)[:1], draw_pixels(1)
    lone = torch.cat((run[:, :4], torch.tensor([[-200]]), run[:, 4 + NUM_IMAGE_TOKENS :]), 1)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=lone, images=pixels).logits, ours(input_ids=run, pixel_values=pixels).logits)


def _oracle_of(values: dict[str, object]) -> Any:
    from transformers import LlavaConfig as HfLlavaConfig
    from transformers import LlavaForConditionalGeneration as HfLlava

    return HfLlava._from_config(HfLlavaConfig(**values), attn_implementation="eager")


def _gradients_as_weights(oracle: torch.nn.Module, gradients: dict[str, Tensor | None]) -> torch.nn.Module:
    """Put each gradient in the place of its weight, so that renaming weights renames gradients."""
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            gradient = gradients[name]
            weight.copy_(torch.zeros_like(weight) if gradient is None else gradient)
    return oracle
