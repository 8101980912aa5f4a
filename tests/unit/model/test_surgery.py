"""Fresh weights and freezing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llavakit.errors import ConfigError, InputError
from llavakit.model.llava import LlamaCore, LlavaCore, PackedBatch
from llavakit.model.surgery import freeze, init_weights, recompute_layers
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM
from tests.tiny import NUM_IMAGE_TOKENS, SIDE, VARIANTS, VOCAB, Variant, llama, llama_config, llava, llava_config


def filled(seed: int) -> LlavaCore:
    core = LlavaCore(llava_config())
    init_weights(core, 0.02, torch.Generator().manual_seed(seed))
    return core


def test_fresh_weights_have_their_spread_and_depend_on_the_seed_alone() -> None:
    one, twin, other = dict(filled(1).named_parameters()), dict(filled(1).named_parameters()), dict(filled(2).named_parameters())
    for name, weight in one.items():
        assert torch.equal(weight, twin[name])
        if name.endswith(".bias"):
            assert not weight.any()
        elif "norm" in name.rsplit(".", 2)[-2]:
            assert bool((weight == 1).all())
        else:
            assert 0.012 < float(weight.detach().std()) < 0.028  # at least 32 draws each
            assert not torch.equal(weight, other[name])


def test_the_padding_row_starts_at_zero() -> None:
    config = llama_config()
    config.pad_token_id = 9
    core = LlamaCore(config)
    init_weights(core, 0.02, torch.Generator().manual_seed(0))
    assert not core.model.embed_tokens.weight[9].any()
    assert core.model.embed_tokens.weight[8].any()


def test_freeze_lets_exactly_the_matches_train_and_counts_them() -> None:
    core = filled(0)
    rows = freeze(core, ("multi_modal_projector.*", "*.embed_tokens.weight"))
    training = {name for name, weight in core.named_parameters() if weight.requires_grad}
    assert training == {
        "language_model.model.embed_tokens.weight",
        *(f"multi_modal_projector.linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")),
    }
    assert [(row.pattern, row.num_tensors) for row in rows] == [("multi_modal_projector.*", 4), ("*.embed_tokens.weight", 1)]
    assert rows[1].num_parameters == 384 * 64


def test_freezing_twice_forgets_the_first_time() -> None:
    core = filled(0)
    freeze(core, ("multi_modal_projector.*",))
    freeze(core, ("*",))
    assert all(weight.requires_grad for weight in core.parameters())


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter matches 'mm_projector"):
        freeze(filled(0), ("mm_projector.*",))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_resizing_keeps_old_rows_and_adds_their_mean(variant: Variant) -> None:
    model = llama(variant)
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(VOCAB + 1, pad_to_multiple_of=64)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head is not None
    assert (embedding.weight.shape[0], head.weight.shape[0], model.config.vocab_size) == (448, 448, 448)
    assert (head.weight is embedding.weight) == variant.is_tied
    assert torch.equal(embedding.weight[:VOCAB], old)
    torch.testing.assert_close(embedding.weight[VOCAB:], old.mean(0).expand(64, -1))
    assert model(input_ids=torch.tensor([[VOCAB]])).logits.shape[-1] == 448
    model.resize_token_embeddings(100)
    assert torch.equal(model.get_input_embeddings().weight, old[:100])
    assert model.resize_token_embeddings().num_embeddings == 100


def test_the_documentations_tip_makes_the_new_pad_token_zero() -> None:
    """Add <pad>, resize, set the id, in either order of the last two; as the Llama-2 page says."""
    for model in (llama(), llava()):
        pad = VOCAB
        model.resize_token_embeddings(VOCAB + 1)
        model.config.pad_token_id = pad
        assert not model.get_input_embeddings()(torch.tensor([pad])).any()
    model = llama()
    model.config.pad_token_id = VOCAB
    model.resize_token_embeddings(VOCAB + 1)
    assert not model.get_input_embeddings().weight[VOCAB].any()


def test_a_pad_row_of_a_checkpoint_stays_and_gets_no_gradient() -> None:
    model = llava()
    row = model.get_input_embeddings().weight[5].detach().clone()
    model.config.pad_token_id = 5
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[5], row)
    assert row.any()
    assert weight.grad is not None
    assert not weight.grad[5].any()
    assert weight.grad[6].any()


def test_a_pad_row_that_does_not_exist_is_refused_when_it_is_used() -> None:
    model = llama()
    model.config.pad_token_id = VOCAB
    with pytest.raises(ConfigError, match="resize_token_embeddings"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_a_llava_config_builds_its_language_model() -> None:
    assert LlamaModel(llava_config()).config.hidden_size == llava_config().text_config.hidden_size


@pytest.mark.parametrize("wrong", [{"new_num_tokens": 0}, {"pad_to_multiple_of": 0}])
def test_sizes_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        llama().resize_token_embeddings(**wrong)


def test_resized_models_save_and_load(tmp_path: Path) -> None:
    model = llava()
    model.resize_token_embeddings(VOCAB + 3)
    model.save_pretrained(tmp_path)
    loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.text_config.vocab_size == VOCAB + 3
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_tensor_parallel_slices_are_rounded_one_by_one() -> None:
    """pretraining_tp: in half precision the partial products are rounded before they are added, in float32 nothing changes."""
    config = llama_config()
    model = LlamaForCausalLM(config)
    layer: Any = model.model.get_submodule("layers.0.mlp.down_proj")
    x = torch.randn(5, config.intermediate_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = layer.weight.detach().bfloat16()
    whole = layer(x)
    config.pretraining_tp = 4
    parts = [x[:, start : start + 24] @ weight[:, start : start + 24].T for start in range(0, 96, 24)]
    assert torch.equal(layer(x), parts[0] + parts[1] + parts[2] + parts[3])
    assert not torch.equal(layer(x), whole)
    torch.testing.assert_close(layer(x.float()), x.float() @ layer.weight.T)
    config.pretraining_tp = 5
    with pytest.raises(ConfigError, match="must divide the width 96"):
        layer(x)


@pytest.mark.parametrize("steps", [(VOCAB + 1,), (VOCAB + 1, VOCAB + 64)], ids=str)
def test_a_new_pad_row_is_zero_in_what_is_saved_too(steps: tuple[int, ...], tmp_path: Path) -> None:
    model = llava()
    for size in steps:
        model.resize_token_embeddings(size)
    model.config.pad_token_id = VOCAB
    model.save_pretrained(tmp_path)
    assert not LlavaLlamaForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight[VOCAB].any()


def test_a_row_that_was_loaded_after_resizing_stays() -> None:
    source, model = llama(), llama()
    for each in (source, model):
        each.resize_token_embeddings(VOCAB + 1)
    source.get_input_embeddings().weight.data[VOCAB] = 3.0
    model.load_state_dict(source.state_dict())
    model.config.pad_token_id = VOCAB
    assert bool((model.get_input_embeddings()(torch.tensor([VOCAB])) == 3.0).all())


def test_models_without_an_image_token_take_pictures_at_the_placeholder_alone() -> None:
    config = llava_config()
    config.image_token_index = None
    model = LlavaLlamaForCausalLM(config)
    model.resize_token_embeddings(VOCAB + 1)
    model.config.pad_token_id = VOCAB
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert model(torch.tensor([[1, 5, 6], [1, 5, VOCAB]]), attention_mask=mask).logits.isfinite().all()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert model(torch.tensor([[1, -200, 5]]), images=pixels).logits.shape[1] == NUM_IMAGE_TOKENS + 2
    assert model.generate(torch.tensor([[1, -200, 5]]), images=pixels, max_new_tokens=2, eos_token_id=[]).shape[1] == NUM_IMAGE_TOKENS + 4


def test_recomputed_layers_have_the_same_bits_and_keep_less() -> None:
    batch = PackedBatch(torch.arange(1, 65), torch.arange(2, 66), torch.arange(64), torch.tensor([0, 64], dtype=torch.int32))
    found = []
    for is_recomputed in (False, True):
        core = LlamaCore(llama_config())
        init_weights(core, 0.1, torch.Generator().manual_seed(0))
        names = [name for name, _ in core.named_parameters()]
        if is_recomputed:
            recompute_layers(core)
        assert [name for name, _ in core.named_parameters()] == names
        kept: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = kept) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = core.loss_packed(batch).sum
        loss.backward()
        found.append((loss, [weight.grad for weight in core.parameters()], sum(kept)))
    (plain, grads, bytes_kept), (again, grads_again, bytes_again) = found
    assert torch.equal(plain, again)
    assert all(torch.equal(one, other) for one, other in zip(grads, grads_again, strict=True) if one is not None and other is not None)
    assert bytes_again < bytes_kept / 3
