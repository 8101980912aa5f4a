"""LoRA against peft over transformers: one step's loss and gradients, merged weights, and folders that each reads of the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor

from llavakit.checkpoint.adapter_save import restore_adapter, save_adapter
from llavakit.checkpoint.load import load_core
from llavakit.cli.main import run
from llavakit.engine.llm import LLM
from llavakit.errors import CheckpointError, ConfigError, StorageError
from llavakit.model.llava import LlamaCore, LlavaCore, PackedBatch
from llavakit.model.lora_config import DECODER_PRODUCTS, LoraConfig
from llavakit.model.surgery import add_lora, freeze, init_weights, merge_lora, quantize
from llavakit.ops.attention import Packed
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlavaLlamaForCausalLM
from llavakit.storage.folder import manifest_problems
from llavakit.types import SamplingParams
from tests.folders import assert_same, edit_json
from tests.lora import add_random_lora, mixed_batch
from tests.tiny import (
    IMAGE_TOKEN,
    VARIANTS,
    copy_weights,
    family_config,
    hf_family,
    hf_llama,
    hf_llava,
    llama,
    llava,
    save_llava,
    tiny_processor,
    tiny_tokenizer,
)  # fmt: skip
from tests.unit.engine.test_engine import CONVERSATIONS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, of its own making
Core = LlamaCore | LlavaCore
CONFIGS = {
    "LoRA": LoraConfig(rank=4, alpha=8, dropout=0.0),
    "rsLoRA": LoraConfig(rank=5, alpha=3, is_rank_stabilized=True),
    "tower and projector too": LoraConfig(rank=3, alpha=4.5, targets=(DECODER_PRODUCTS, "vision_tower.*_proj", "*.linear_?")),
}
FACTORS = ("*.lora_?",)
WITH_PROJECTOR = (*FACTORS, "multi_modal_projector.*")


def adapted_llava(config: LoraConfig, oracle: Any, trainable: tuple[str, ...] = FACTORS) -> LlavaLlamaForCausalLM:
    """Give our LLaVA the oracle's weights and random factors."""
    core = copy_weights(oracle, llava())
    add_random_lora(core, config)
    freeze(core, trainable)
    if "multi_modal_projector.*" in trainable:
        with torch.no_grad():
            for weight in core.multi_modal_projector.parameters():
                weight.mul_(1.1)
    return core


def their_logits(model: Any, batch: PackedBatch) -> Tensor:
    """Run the sequences of a batch one by one."""
    rows = []
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = batch.ids_T[start:stop].where(batch.ids_T[start:stop] >= 0, IMAGE_TOKEN)
        pixels = {"pixel_values": batch.pixels_N3SS} if bool((ids == IMAGE_TOKEN).any()) else {}
        rows.append(model(input_ids=ids[None], **pixels).logits[0])
    return torch.cat(rows)


def their_loss(model: Any, batch: PackedBatch) -> Tensor:
    return torch.nn.functional.cross_entropy(their_logits(model, batch), batch.labels_T, ignore_index=IGNORE, reduction="sum")


def our_logits(core: Core, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        if isinstance(core, LlavaCore):
            features = None if batch.pixels_N3SS is None else core.encode_images(batch.pixels_N3SS)
            x_TD = core.embed(batch.ids_T, features)
        else:
            x_TD = core.embed(batch.ids_T)
        return core.logits(core.forward_packed(x_TD, batch.positions_T, Packed(batch.cu_seqlens)))


def assert_close_logits(found: Tensor, expected: Tensor) -> None:
    """Assert that no logit is off by more than 1e-5 of the largest."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


def in_memory(stored: str) -> str:
    """Return the name that peft gives a parameter of a name in its files."""
    path, _, leaf = stored.rpartition(".")
    return f"{path}.default.weight" if path.endswith(("lora_A", "lora_B")) else f"{path}.modules_to_save.default.{leaf}"


@pytest.mark.parametrize("has_picture", [True, False], ids=["picture", "text"])
@pytest.mark.parametrize(
    ("kind", "trainable"),
    [*((kind, FACTORS) for kind in CONFIGS), ("LoRA", WITH_PROJECTOR)],
    ids=[*CONFIGS, "LoRA and a projector"],
)
def test_a_step_has_the_loss_and_the_gradients_of_peft(tmp_path: Path, kind: str, trainable: tuple[str, ...], has_picture: bool) -> None:
    oracle, batch = hf_llava(), mixed_batch(has_picture=has_picture)
    core = adapted_llava(CONFIGS[kind], oracle, trainable)
    stored = save_adapter(core, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(oracle, tmp_path / "adapter", is_trainable=True)
    loss = core.loss_packed(batch).sum
    loss.backward()
    their = their_loss(theirs, batch)
    their.backward()
    torch.testing.assert_close(loss, their, rtol=1e-5, atol=0.0)
    trained = {name: weight for name, weight in theirs.named_parameters() if weight.requires_grad}
    assert set(trained) == {in_memory(name) for name in stored}
    ours = dict(zip(stored, (weight for weight in core.parameters() if weight.requires_grad), strict=True))
    for name, weight in ours.items():
        expected = trained[in_memory(name)].grad
        if expected is None:  # without a picture nothing reaches the projector
            assert not has_picture or "vision_tower" in name  # nor the last layer of the tower, which is not read
            assert weight.grad is None
            continue
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_is_what_peft_does(tmp_path: Path, kind: str) -> None:
    oracle, batch = hf_llava(), mixed_batch()
    core = adapted_llava(CONFIGS[kind], oracle)
    save_adapter(core, tmp_path / "adapter")
    adapted = our_logits(core, batch)
    theirs = PeftModel.from_pretrained(oracle, tmp_path / "adapter")
    with torch.no_grad():
        assert_close_logits(adapted, their_logits(theirs, batch))
    merge_lora(core)
    assert_close_logits(our_logits(core, batch), adapted)
    expected = copy_weights(theirs.merge_and_unload(), llava())
    assert_same(core.state_dict(), expected.state_dict())


@pytest.mark.parametrize("trainable", [FACTORS, WITH_PROJECTOR], ids=["LoRA", "LoRA and a projector"])
def test_an_adapter_goes_to_the_engine_to_merge_and_back(tmp_path: Path, trainable: tuple[str, ...]) -> None:
    base = save_llava(tmp_path / "base")
    (base / "LICENSE").write_text("be kind")
    core = load_core(base)
    assert isinstance(core, LlavaCore)
    add_random_lora(core, CONFIGS["LoRA"])
    freeze(core, trainable)
    core.multi_modal_projector.get_parameter("linear_1.weight").data.mul_(1.5 if trainable == WITH_PROJECTOR else 1.0)
    save_adapter(core, tmp_path / "adapter", base=base)
    assert manifest_problems(tmp_path / "adapter", check_hashes=True) == []
    assert (tmp_path / "adapter" / "LICENSE").read_text() == "be kind"
    conversation, greedy = CONVERSATIONS[0], SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
    expected = LLM.of(core, tiny_processor()).chat(conversation, greedy)
    assert LLM(tmp_path / "adapter", dtype="float32", device="cpu").chat(conversation, greedy).ids == expected.ids
    if trainable == FACTORS:
        beside = LLM(base, dtype="float32", device="cpu", adapters={"mine": tmp_path / "adapter"})
        assert beside.chat(conversation, greedy, adapter="mine").ids == expected.ids != beside.chat(conversation, greedy).ids
    assert run(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merge_lora(core)
    assert_same(load_core(tmp_path / "merged").state_dict(), core.state_dict())


def trained_weights(core: Core) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in core.named_parameters() if weight.requires_grad}


def train_a_step(core: Core, *, has_picture: bool = True) -> float:
    """Move what trains against its gradient; returns the loss before."""
    weights = [weight for weight in core.parameters() if weight.requires_grad]
    loss = core.loss_packed(mixed_batch(has_picture=has_picture)).sum
    with torch.no_grad():
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.sub_(gradient, alpha=0.001)
    return float(loss)


def test_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    core, other = (adapted_llava(CONFIGS["rsLoRA"], hf_llava(), WITH_PROJECTOR) for _ in range(2))
    before = train_a_step(core)
    save_adapter(core, tmp_path / "adapter")
    restore_adapter(other, tmp_path / "adapter")
    assert_same(trained_weights(other), trained_weights(core))
    assert train_a_step(core) == train_a_step(other) != before
    assert_same(trained_weights(other), trained_weights(core))


def test_what_peft_trained_can_be_trained_on(tmp_path: Path) -> None:
    oracle, batch = hf_llava(), mixed_batch()
    core = copy_weights(oracle, llava())
    theirs, ours = r".*language_model.*\.(q|down)_proj", ("language_model.*.q_proj", "language_model.*.down_proj")
    wrapped = get_peft_model(oracle, PeftConfig(r=4, lora_alpha=8, target_modules=theirs, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    names = add_lora(core, LoraConfig(rank=4, alpha=8, targets=ours), torch.Generator())
    freeze(core, FACTORS)
    restore_adapter(core, tmp_path / "adapter")
    assert len(names) == 4
    torch.testing.assert_close(core.loss_packed(batch).sum, their_loss(wrapped, batch), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_language_models_have_adapters_too(tmp_path: Path, variant: Any) -> None:
    oracle, batch = hf_llama(variant), mixed_batch(has_picture=False)
    core = copy_weights(oracle, llama(variant))
    oracle.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    add_random_lora(core, CONFIGS["LoRA"])
    tables = () if variant.is_tied else ("model.embed_tokens.*", "lm_head.*")
    freeze(core, (*FACTORS, *tables, "model.norm.*"))
    train_a_step(core, has_picture=False)
    save_adapter(core, tmp_path / "adapter", base=tmp_path / "base")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == (["model.norm"] if variant.is_tied else ["lm_head", "model.embed_tokens", "model.norm"])
    theirs = PeftModel.from_pretrained(oracle, tmp_path / "adapter")
    with torch.no_grad():
        assert_close_logits(our_logits(core, batch), their_logits(theirs, batch))
    other = copy_weights(hf_llama(variant), llama(variant))
    add_random_lora(other, CONFIGS["LoRA"], seed=1)
    freeze(other, (*FACTORS, *tables, "model.norm.*"))
    restore_adapter(other, tmp_path / "adapter")
    assert_same(other.state_dict(), core.state_dict())
    merge_lora(core)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "adapter").state_dict(), core.state_dict())


@pytest.mark.parametrize("family", ["interleave", "1.6-mistral"])
def test_the_family_has_the_names_of_its_classes(tmp_path: Path, family: str) -> None:
    config = family_config(family)
    oracle, batch = hf_family(config), mixed_batch(has_picture=False)
    core = copy_weights(oracle, LlavaLlamaForCausalLM(config))
    add_random_lora(core, CONFIGS["tower and projector too"])
    freeze(core, FACTORS)
    save_adapter(core, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(oracle, tmp_path / "adapter")
    with torch.no_grad():
        assert_close_logits(our_logits(core, batch), their_logits(theirs, batch))
    merge_lora(core)
    assert_same(copy_weights(theirs.merge_and_unload(), LlavaLlamaForCausalLM(config)).state_dict(), core.state_dict())


def test_an_adapter_over_packed_weights_is_one_like_any_other(tmp_path: Path) -> None:
    dense, packed = (adapted_llava(CONFIGS["LoRA"], hf_llava()) for _ in range(2))
    quantize(packed, "nf4", torch.device("cpu"), has_double_scales=True)
    values = packed.config.to_dict()
    for core, name in ((dense, "dense"), (packed, "packed")):
        save_adapter(core, tmp_path / name, base="owner/model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    train_a_step(packed)
    save_adapter(packed, tmp_path / "packed", overwrite=True)
    restore_adapter(dense, tmp_path / "packed")
    assert_same(trained_weights(dense), trained_weights(packed))
    assert packed.config.to_dict() == values
    assert "quant" not in json.dumps(values)


def test_weights_that_lie_elsewhere_are_written_for_the_cores_own(tmp_path: Path) -> None:
    core = adapted_llava(CONFIGS["LoRA"], hf_llava(), WITH_PROJECTOR)
    gathered = {name: weight + 1 for name, weight in trained_weights(core).items()}
    save_adapter(core, tmp_path / "adapter", weights=gathered)
    restore_adapter(core, tmp_path / "adapter")
    assert_same(trained_weights(core), gathered)


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    core = llava()
    with pytest.raises(ConfigError, match="factors of one LoraConfig, the model has 0"):
        save_adapter(core, tmp_path / "adapter")
    add_random_lora(core, CONFIGS["LoRA"])
    freeze(core, (*FACTORS, "*.layers.0.mlp.up_proj.base.weight", "multi_modal_projector.linear_2.weight"))
    with pytest.raises(ConfigError, match=r"up_proj\.base\.weight trains beside its own factors; freeze it; .*linear_2 was .*its bias"):
        save_adapter(core, tmp_path / "adapter")
    tied = llama(VARIANTS[2])
    add_random_lora(tied, CONFIGS["LoRA"])
    freeze(tied, (*FACTORS, "*.embed_tokens.weight"))
    with pytest.raises(ConfigError, match=r"embed_tokens.weight trains, which is lm_head.weight as well; freeze it"):
        save_adapter(tied, tmp_path / "adapter")
    pieces = LlavaLlamaForCausalLM(family_config("1.6-vicuna"))
    init_weights(pieces, 0.1, torch.Generator())
    add_random_lora(pieces, CONFIGS["LoRA"])
    freeze(pieces, (*FACTORS, "image_newline"))
    with pytest.raises(ConfigError, match="image_newline, trained whole, is no module's weight or bias"):
        save_adapter(pieces, tmp_path / "adapter")
    add_random_lora(core, LoraConfig(rank=2, alpha=4, targets=("multi_modal_projector.linear_1",)))
    with pytest.raises(ConfigError, match="factors of one LoraConfig, the model has 2"):
        save_adapter(core, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_does_not_fit_fills_nothing(tmp_path: Path) -> None:
    core = adapted_llava(CONFIGS["LoRA"], hf_llava(), WITH_PROJECTOR)
    save_adapter(core, tmp_path / "adapter")
    with pytest.raises(StorageError, match="exists; choose another folder or allow overwriting"):
        save_adapter(core, tmp_path / "adapter")
    others = {
        "linear_1.weight, which does not train": (CONFIGS["LoRA"], FACTORS),
        r"q_proj.lora_A has shape \[4, 64\], expected \[5, 64\]": (LoraConfig(rank=5, alpha=10), WITH_PROJECTOR),
        "its products are scaled by 2.0, the model's by 4.0": (LoraConfig(rank=4, alpha=16), WITH_PROJECTOR),
        "norm.weight trains, and it does not hold it": (CONFIGS["LoRA"], (*WITH_PROJECTOR, "*.model.norm.weight")),
    }
    for told, (config, trainable) in others.items():
        other = llava()
        add_lora(other, config, torch.Generator())
        freeze(other, trainable)
        before = trained_weights(other)
        with pytest.raises(CheckpointError, match=told):
            restore_adapter(other, tmp_path / "adapter")
        assert_same(trained_weights(other), before)
    edit_json(tmp_path / "adapter" / "adapter_config.json", use_rslora=True)
    with pytest.raises(CheckpointError, match=r"its products are scaled by 4.0, the model's by 2.0"):
        restore_adapter(core, tmp_path / "adapter")


def test_an_adapter_with_magnitudes_is_not_trained_on(tmp_path: Path) -> None:
    get_peft_model(hf_llava(), PeftConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "adapter")
    core = llava()
    add_lora(core, LoraConfig(rank=2, alpha=8, targets=("*q_proj",)), torch.Generator())
    freeze(core, FACTORS)
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector for .*q_proj; lora_A and lora_B can be trained on"):
        restore_adapter(core, tmp_path / "adapter")


def test_models_with_factors_or_packed_weights_are_no_checkpoints(tmp_path: Path) -> None:
    factored, packed = llava(), llava()
    add_random_lora(factored, CONFIGS["LoRA"])
    quantize(packed, "nf4", torch.device("cpu"))
    for core, told in ((factored, "LoraLinear.*merge_lora"), (packed, "QuantizedLinear")):
        with pytest.raises(ConfigError, match=told):
            core.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
