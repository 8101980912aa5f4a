"""LoRA that trains: how factors begin, where they go, what refuses them; packed weights beside them, recomputation and compilation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llavakit.config import build_run_config
from llavakit.errors import ConfigError
from llavakit.model.config import LlamaConfig
from llavakit.model.decoder import DecoderLayer, rope_spec
from llavakit.model.linear import Linear, QuantizedLinear
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.lora_config import LoraConfig
from llavakit.model.lora_linear import LoraLinear
from llavakit.model.surgery import add_lora, freeze, init_weights, merge_lora, quantize
from llavakit.ops.attention import Packed
from llavakit.ops.quantize.weights import dense
from llavakit.ops.rope import rope_tables
from tests.lora import add_random_lora, mixed_batch
from tests.tiny import decoder_config, llama, llama_config, llava, scale_weights

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(core: Any, kind: str) -> Any:
    """Store a core's products as integers."""
    quantize(core, kind.split()[0], CPU, has_double_scales="double" in kind)
    return core


def plain(core: Any) -> Any:
    """Leave a core as it is."""
    return core


def densified(core: Any) -> Any:
    """Put the weights that packed ones stand for in their places."""
    packed = [(path, child) for path, child in core.named_modules() if isinstance(child, QuantizedLinear)]
    for path, child in packed:
        linear = Linear(child.in_features, child.out_features, bias=child.bias is not None)
        parts = {name: getattr(child, name) for name in child.part_names}
        linear.weight, linear.bias = torch.nn.Parameter(dense(parts, child.shape, torch.float32)), child.bias  # type: ignore[assignment]
        core.set_submodule(path, linear)
    return core


def trained_gradients(core: Any, dtype: torch.dtype = torch.float32, *, has_picture: bool = True) -> dict[str, torch.Tensor]:
    """Return the gradients of one batch, and its loss."""
    core.zero_grad()
    terms = core.loss_packed(mixed_batch(has_picture=has_picture), dtype=dtype)
    terms.sum.backward()
    found = {name: weight.grad for name, weight in core.named_parameters() if weight.requires_grad}
    assert None not in found.values()
    return {"loss": terms.sum.detach(), **found}


def test_factors_begin_as_pefts_do_and_depend_on_the_generator_alone() -> None:
    cores = [llava() for _ in range(2)]
    names = [add_lora(core, LoraConfig(rank=8, alpha=16), seeded(3)) for core in cores]
    assert names[0] == names[1]
    assert len(names[0]) == 2 * 7
    assert names[0][0] == "language_model.model.layers.0.self_attn.q_proj"
    generator = seeded(3)
    for name in names[0]:
        one, other = (core.get_submodule(name) for core in cores)
        assert isinstance(one, LoraLinear)
        assert isinstance(other, LoraLinear)
        assert isinstance(one.base, Linear)
        expected = torch.nn.init.kaiming_uniform_(torch.empty_like(one.lora_A), a=math.sqrt(5), generator=generator)
        assert torch.equal(one.lora_A, expected)
        assert torch.equal(one.lora_A, other.lora_A)
        assert one.lora_A.dtype == one.lora_B.dtype == torch.float32
        assert not one.lora_B.any()
        assert (one.lora_A.requires_grad, one.base.weight.requires_grad) == (True, False)


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4", "nf4 double"])
def test_fresh_factors_change_no_bit(kind: str) -> None:
    core = llava() if kind == "dense" else packed(llava(), kind)
    batch, values = mixed_batch(), core.config.to_dict()
    before = core.loss_packed(batch).sum
    add_lora(core, LoraConfig(rank=4, alpha=4), seeded())
    assert torch.equal(core.loss_packed(batch).sum, before)
    assert core.config.to_dict() == values


def test_freeze_sees_factors_by_the_names_of_their_products() -> None:
    core = llava()
    names = add_lora(
        core, LoraConfig(rank=4, alpha=8, targets=("language_model.*.self_attn.[qv]_proj", "multi_modal_projector.*_2")), seeded()
    )
    assert [name.rpartition(".")[2] for name in names] == ["linear_2", "q_proj", "v_proj", "q_proj", "v_proj"]
    rows = freeze(core, ("*.lora_?", "multi_modal_projector.linear_1.*"))
    assert [row.num_tensors for row in rows] == [10, 2]
    assert {name for name, weight in core.named_parameters() if weight.requires_grad} == {
        *(f"{name}.{factor}" for name in names for factor in ("lora_A", "lora_B")),
        *(f"multi_modal_projector.linear_1.{leaf}" for leaf in ("weight", "bias")),
    }


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("*.q_proj", "*.query"), r"no module matches lora.targets '\*\.query'; names look like 'vision_tower.*_proj'"),
        (("*.input_layernorm",), "an? RMSNorm; only products other than the head"),
        (("*.embed_tokens",), "TokenEmbedding; only products"),
        (("language_model.*.self_attn",), "SelfAttention; only products"),
        (("*lm_head",), "lm_head', a Linear; only products other than the head"),
        (("*",), "LlavaLlamaForCausalLM; only products"),
    ],
)
def test_targets_that_are_no_products_are_refused(targets: tuple[str, ...], told: str) -> None:
    core = llava()
    with pytest.raises(ConfigError, match=told):
        add_lora(core, LoraConfig(rank=4, alpha=4, targets=targets), seeded())
    assert not any(isinstance(module, LoraLinear) for module in core.modules())


def test_factors_are_added_once_and_to_weights_that_are_there() -> None:
    core = llama()
    add_lora(core, LoraConfig(rank=4, alpha=4), seeded())
    with pytest.raises(ConfigError, match="a LoraLinear; only products"):
        add_lora(core, LoraConfig(rank=4, alpha=4), seeded())
    with torch.device("meta"):
        empty = LlamaCore(llama_config())
    with pytest.raises(ConfigError, match="has no weight yet; load the model"):
        add_lora(empty, LoraConfig(rank=4, alpha=4), seeded())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "lora.alpha must be above 0"),
        ({"dropout": 1.0}, "lora.dropout must be at least 0 and below 1"),
        ({"targets": ()}, "lora.targets needs at least one pattern"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LoraConfig(**{"rank": 4, "alpha": 8.0, **values})


def test_settings_are_read_from_a_table_and_scale_by_the_rank() -> None:
    values = {"rank": 16, "alpha": 8, "targets": ["*.q_proj"]}
    assert build_run_config(LoraConfig, values) == LoraConfig(rank=16, alpha=8.0, targets=("*.q_proj",))
    assert build_run_config(LoraConfig, values).scale == 0.5
    assert build_run_config(LoraConfig, {**values, "is_rank_stabilized": True}).scale == 2.0


def test_packed_codes_cannot_be_told_to_train() -> None:
    core = packed(llava(), "nf4 double")
    with pytest.raises(ConfigError, match=r"'language_model\.\*' matches .*codes', packed codes that cannot train; '\*\.lora_\?'"):
        freeze(core, ("language_model.*",))
    with pytest.raises(ConfigError, match="with double scales as nf4; got 'int8'"):
        packed(llava(), "int8 double")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_what_the_model_says(dtype: torch.dtype) -> None:
    core, batch = llava(), mixed_batch()
    names = add_random_lora(core, LoraConfig(rank=4, alpha=12, dropout=0.3))
    core.eval()
    adapted, expected = core.loss_packed(batch).sum, {}
    for name in names:
        module = core.get_submodule(name)
        assert isinstance(module, LoraLinear)
        module.base.to(dtype)
        weight = module.base.get_parameter("weight")
        expected[name] = (weight.float() + module.lora_B @ module.lora_A * 3.0).to(dtype)
    merge_lora(core)
    assert not any(isinstance(module, LoraLinear) for module in core.modules())
    for name in names:
        assert torch.equal(core.get_submodule(name).get_parameter("weight"), expected[name])
    if dtype == torch.float32:
        torch.testing.assert_close(core.loss_packed(batch).sum, adapted, rtol=1e-5, atol=0.0)
        assert set(dict(core.named_parameters())) == set(dict(llava().named_parameters()))


def test_packed_weights_take_no_factors() -> None:
    core = packed(llava(), "nf4")
    add_lora(core, LoraConfig(rank=4, alpha=4), seeded())
    with pytest.raises(ConfigError, match="q_proj' is packed and cannot take factors; save them as an adapter"):
        merge_lora(core)
    assert any(isinstance(module, LoraLinear) for module in core.modules())


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4 double"])
@pytest.mark.parametrize("has_picture", [True, False])
def test_training_over_packed_weights_is_training_over_what_they_stand_for(kind: str, has_picture: bool) -> None:
    found = []
    for prepare in (plain, densified):
        core = prepare(packed(llava(), kind))
        add_random_lora(core, LoraConfig(rank=4, alpha=8))
        freeze(core, ("*.lora_?", "multi_modal_projector.*") if has_picture else ("*.lora_?",))
        found.append(trained_gradients(core, has_picture=has_picture))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_biases_beside_packed_weights_can_train() -> None:
    found = []
    for prepare in (plain, densified):
        core = LlamaCore(decoder_config("qwen2"))
        init_weights(core, 1.0, seeded())
        core = prepare(packed(scale_weights(core), "nf4"))
        freeze(core, ("*.bias",))
        found.append(trained_gradients(core, has_picture=False))
    assert len(found[0]) == 1 + 2 * 3
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_bfloat16_activations_give_float32_gradients(kind: str) -> None:
    core = llava() if kind == "dense" else packed(llava(), kind)
    add_random_lora(core, LoraConfig(rank=4, alpha=8))
    freeze(core, ("*.lora_?",))
    exact, rounded = trained_gradients(core), trained_gradients(core, torch.bfloat16)
    assert {gradient.dtype for gradient in rounded.values()} == {torch.float32}
    for name, gradient in rounded.items():
        assert float((gradient - exact[name]).norm() / exact[name].norm()) < 0.1, name  # measured 0.02 to 0.05


def in_layer(layer: DecoderLayer, config: LlamaConfig, run: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the result of one decoder layer, and the gradients of its input and factors."""
    torch.manual_seed(5)
    x = torch.randn(12, config.hidden_size, generator=seeded(1)).to(dtype).requires_grad_()
    rope, attn = rope_tables(torch.arange(12), rope_spec(config), dtype), Packed(torch.tensor([0, 5, 12]))
    layer.zero_grad()
    y = run(x, rope, attn)
    y.backward(torch.ones_like(y))
    return [y, x.grad, *(weight.grad for weight in layer.parameters() if weight.requires_grad)]  # type: ignore[list-item]


def factored_layer(kind: str, dropout: float) -> tuple[DecoderLayer, LlamaConfig]:
    core = llama() if kind == "dense" else packed(llama(), kind)
    add_random_lora(core, LoraConfig(rank=4, alpha=8, dropout=dropout))
    freeze(core, ("*.lora_?",))
    layer = core.model.layers[0]
    assert isinstance(layer, DecoderLayer)
    return layer.train(), core.config


@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_recomputation_draws_the_same_dropout(kind: str) -> None:
    layer, config = factored_layer(kind, 0.5)
    once = in_layer(layer, config, layer, torch.float32)
    again = in_layer(layer, config, lambda *args: checkpoint(layer, *args, use_reentrant=False), torch.float32)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(once[0], in_layer(layer.eval(), config, layer, torch.float32)[0])


@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_a_layer_compiles_whole_and_keeps_no_dense_weight(kind: str) -> None:
    torch.compiler.reset()
    layer, config = factored_layer(kind, 0.0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected, kept = in_layer(layer, config, layer, torch.bfloat16), set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.add((tensor.is_floating_point(), *sorted(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = in_layer(layer, config, compiled, torch.bfloat16)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    shapes = {(True, *sorted((module.out_features, module.in_features))) for module in layer.modules() if isinstance(module, LoraLinear)}
    assert (shapes <= kept) == (kind == "dense")
    assert not shapes & kept or kind == "dense"


def test_a_llava_without_a_picture_trains_its_factors_alone() -> None:
    core = llava()
    assert isinstance(core, LlavaCore)
    add_random_lora(core, LoraConfig(rank=4, alpha=8))
    freeze(core, ("*.lora_?",))
    assert all(gradient.any() for gradient in trained_gradients(core, has_picture=False).values())
