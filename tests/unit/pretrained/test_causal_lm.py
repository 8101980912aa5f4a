"""The batch-shaped face: outputs, refusals, files, generation's arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llavakit.errors import CheckpointError, ConfigError, InputError, PromptError
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE, llama, llama_config, llava, save_llava

IDS = torch.tensor([[1, 5, 6, 7]])


def test_outputs_are_read_by_attribute_name_and_position() -> None:
    output = llama()(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert output["logits"] is output.logits
    assert output[0] is output.loss
    assert output[1] is output.logits
    assert output[:2] == (output.loss, output.logits)
    assert len(output.to_tuple()) == 4
    with pytest.raises(KeyError):
        output["attentions"]


def test_use_cache_follows_the_config_unless_asked() -> None:
    model = llama()
    assert model(input_ids=IDS).past_key_values is not None
    assert model(input_ids=IDS, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(input_ids=IDS).past_key_values is None


@pytest.mark.parametrize("arguments", [{}, {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 4, 64)}])
def test_exactly_one_of_ids_and_embeddings(arguments: dict[str, Any]) -> None:
    for model in (llama(), llava(), LlamaModel(llama_config())):
        with pytest.raises(InputError, match="exactly one"):
            model(**arguments)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"attention_mask must be \[1, 4\]"):
        llama()(input_ids=IDS, attention_mask=torch.ones(1, 3))


def test_images_and_pixel_values_are_one_thing() -> None:
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    ids = torch.tensor([[1, -200, 5]])
    model = llava()
    with torch.no_grad():
        by_name = [model(input_ids=ids, **{name: pixels}).logits for name in ("images", "pixel_values")]
        by_list = model(input_ids=ids, images=list(pixels)).logits
    assert torch.equal(by_name[0], by_name[1])
    assert torch.equal(by_name[0], by_list)
    assert by_list.shape[1] == 2 + NUM_IMAGE_TOKENS
    for call in (model, model.generate):
        with pytest.raises(InputError, match="the same thing"):
            call(input_ids=ids, images=pixels, pixel_values=pixels)


@pytest.mark.parametrize(("num_pictures", "told"), [(0, "16 image positions"), (2, "pictures")])
def test_too_few_and_too_many_pictures_are_refused(num_pictures: int, told: str) -> None:
    model, ids = llava(), torch.tensor([[1, *[IMAGE_TOKEN] * NUM_IMAGE_TOKENS, 5]])
    pixels = torch.zeros(num_pictures, 3, SIDE, SIDE) if num_pictures else None
    for call in (model, model.generate):
        with pytest.raises(InputError, match=told):
            call(input_ids=ids, pixel_values=pixels)


def test_fresh_models_have_weights_of_the_configs_spread() -> None:
    config = llama_config()
    config.initializer_range = 0.5
    torch.manual_seed(3)
    first = LlamaForCausalLM(config)
    torch.manual_seed(3)
    second = LlamaForCausalLM(config)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert 0.45 < float(first.lm_head.weight.detach().std()) < 0.55


def test_saved_models_come_back_bit_for_bit_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "model")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert not back.training
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    assert LlamaForCausalLM.from_pretrained(str(tmp_path / "model"), dtype="bfloat16").dtype == torch.bfloat16
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16).dtype == torch.float16
    assert back.num_parameters() == sum(weight.numel() for weight in model.parameters())
    assert back.device.type == "cpu"


def test_another_kind_of_model_and_dtype_are_refused(tmp_path: Path) -> None:
    save_llava(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a llava model, LlamaForCausalLM needs llama"):
        LlamaForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="dtype must be one of float32"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="int8")
    with pytest.raises(CheckpointError):
        LlamaForCausalLM.from_pretrained(tmp_path / "nothing")


def test_generate_draws_by_row_seed_whatever_the_batch() -> None:
    model, ids = llama(), torch.tensor([[1, 5, 6, 7], [1, 9, 8, 3]])
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "eos_token_id": []}
    together = model.generate(ids, seed=4, **arguments)
    assert torch.equal(together, model.generate(ids, seed=4, **arguments))
    for row in range(2):
        assert torch.equal(together[row : row + 1], model.generate(ids[row : row + 1], seed=4 + row, **arguments))
    assert not torch.equal(together, model.generate(ids, seed=40, **arguments))


def test_generate_takes_several_ends_and_fills_with_the_pad_id() -> None:
    model, ids = llama(), torch.tensor([[1, 5, 6, 7], [1, 9, 8, 3]])
    free = model.generate(ids, max_new_tokens=6, eos_token_id=[])
    assert free.shape == (2, 10)
    end = int(free[0, 5])
    assert end not in free[1, 4:].tolist()
    ended = model.generate(ids, max_new_tokens=6, eos_token_id=[end, 2], pad_token_id=11)
    assert ended[0].tolist() == [*free[0, :6].tolist(), 11, 11, 11, 11]
    assert torch.equal(ended[1], free[1])


def test_a_row_hidden_by_the_mask_is_refused() -> None:
    with pytest.raises(InputError, match="hides a whole row"):
        llama().generate(IDS, attention_mask=torch.zeros_like(IDS))


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(PromptError, match="no room to answer"):
        llama().generate(torch.ones(1, 256, dtype=torch.int64))


def test_generation_ends_at_the_context() -> None:
    ids = torch.ones(1, 250, dtype=torch.int64)
    assert llama().generate(ids, max_new_tokens=50, eos_token_id=[]).shape == (1, 256)


def test_what_forward_returns_falls_back_to_the_config() -> None:
    for model in (llama(), llava(), LlamaModel(llama_config())):
        ids = torch.tensor([[1, 5, 6]])
        assert model(ids).hidden_states is None
        model.config.output_hidden_states, model.config.output_attentions = True, True
        output = model(ids)
        assert len(output.hidden_states) == len(output.attentions) + 1 == 3
        assert model(ids, output_attentions=False).attentions is None
        model.config.return_dict = False
        assert isinstance(model(ids), tuple)
        assert not isinstance(model(ids, return_dict=True), tuple)


def test_a_picture_may_come_in_a_later_turn_over_a_cache() -> None:
    model, pixels = llava(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    first, second = torch.tensor([[1, 5, -200, 7]]), torch.tensor([[9, -200, 11]])
    whole = model(torch.cat((first, second), 1), images=pixels).logits
    cache = model(first, images=pixels[:1]).past_key_values
    for mask in (None, torch.ones(1, cache[0][0].shape[2] + 3)):
        later = model(second, images=pixels[1:], past_key_values=cache, attention_mask=mask).logits
        torch.testing.assert_close(later, whole[:, -later.shape[1] :], atol=1e-4, rtol=0)


def test_a_cached_step_of_one_token_leaves_pictures_alone() -> None:
    model, pixels = llava(), torch.randn(1, 3, SIDE, SIDE)
    cache = model(torch.tensor([[1, -200]]), images=pixels).past_key_values
    with_pictures = model(torch.tensor([[9]]), images=pixels, past_key_values=cache).logits
    assert torch.equal(with_pictures, model(torch.tensor([[9]]), past_key_values=cache).logits)
