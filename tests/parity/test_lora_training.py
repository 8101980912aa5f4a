"""LoRA in training: one step's loss and gradients are peft's over transformers, and so are logits after saving and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llavakit.checkpoint.adapter_save import adapter_parameters, check_adapter, write_adapter
from llavakit.checkpoint.load import load_core
from llavakit.checkpoint.parts import Sources
from llavakit.engine.llm import LLM
from llavakit.errors import ConfigError
from llavakit.model.llava import LlavaCore, PackedBatch
from llavakit.model.lora_config import LoraConfig
from llavakit.model.lora_layer import adapters_off
from llavakit.model.surgery import add_lora, freeze, merge_lora, quantize
from llavakit.ops.attention import Packed
from llavakit.types import Conversation
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE, save_llava

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's
PROJECTOR = ("linear_1", "linear_2")
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({"rank": 4, "alpha": 8.0}, False),
    "rslora": ({"rank": 3, "alpha": 5.0, "is_rank_stabilized": True}, False),
    "lora and projector": ({"rank": 4, "alpha": 8.0}, True),
}
IDS = torch.cat((torch.full((NUM_IMAGE_TOKENS,), IMAGE_TOKEN), torch.arange(5, 25)))
PIXELS = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("lora") / "model")


def batch() -> PackedBatch:
    labels = torch.cat((IDS[1:], torch.tensor([-100])))
    labels[: NUM_IMAGE_TOKENS - 1] = -100
    return PackedBatch(IDS, labels, torch.arange(IDS.numel()), torch.tensor([0, IDS.numel()], dtype=torch.int32), PIXELS)


def adapted(folder: Path, options: dict[str, Any], *, with_projector: bool) -> LlavaCore:
    core = load_core(folder, dtype=torch.float32)
    assert isinstance(core, LlavaCore)
    paths = add_lora(core, LoraConfig(**options), torch.Generator().manual_seed(1))
    assert len(paths) == 2 * 7
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in core.named_parameters():
            if name.endswith(".lora_B"):
                weight.normal_(0.0, 0.1, generator=generator)
    freeze(core, ("*.lora_A", "*.lora_B", *(("multi_modal_projector.*",) if with_projector else ())))
    return core


def save(core: LlavaCore, options: dict[str, Any], destination: Path, base: Path) -> Path:
    destination.mkdir()
    tensors = ((name, weight.detach()) for name, (_, weight) in adapter_parameters(core).items())
    write_adapter(core, LoraConfig(**options), destination, tensors, base=str(base), source=base)
    return destination


def logits(core: LlavaCore) -> Tensor:
    with torch.no_grad():
        x_TD = core.embed(IDS, core.encode_images(PIXELS))
        return core.logits(core.forward_packed(x_TD, torch.arange(IDS.numel()), Packed(torch.tensor([0, IDS.numel()]))))


def their_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None], pixel_values=PIXELS).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_the_saved_adapter_are_pefts(folder: Path, tmp_path: Path, kind: str) -> None:
    options, with_projector = KINDS[kind]
    core = adapted(folder, options, with_projector=with_projector)
    check_adapter(core)
    saved = save(core, options, tmp_path / "adapter", folder)
    base = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = PeftModel.from_pretrained(base, saved, is_trainable=True)
    torch.testing.assert_close(logits(core), their_logits(theirs), rtol=1e-5, atol=1e-4)

    terms = core.loss_packed(batch())
    (terms.sum / terms.weight).backward()
    labels = IDS.clone()
    labels[:NUM_IMAGE_TOKENS] = -100
    loss = theirs(input_ids=IDS[None], pixel_values=PIXELS, labels=labels[None]).loss
    loss.backward()
    torch.testing.assert_close(terms.sum / terms.weight, loss, rtol=1e-5, atol=1e-6)
    grads = {name.replace(".default", "").replace(".modules_to_save", ""): weight.grad for name, weight in theirs.named_parameters()}
    named = adapter_parameters(core)
    assert len(named) == 2 * 2 * 7 + 4 * with_projector
    for stored, weight in named.values():
        expected = grads[stored]
        assert expected is not None, stored
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_merged_weights_and_an_engine_with_the_adapter_answer_alike(folder: Path, tmp_path: Path) -> None:
    options, _ = KINDS["lora"]
    core = adapted(folder, options, with_projector=False)
    saved, before = save(core, options, tmp_path / "adapter", folder), logits(core)
    with adapters_off(core):
        plain = logits(core)
    assert torch.equal(plain, logits(load_core(folder, dtype=torch.float32)))  # type: ignore[arg-type]
    assert not torch.allclose(plain, before, atol=1e-2)
    merge_lora(core)
    torch.testing.assert_close(logits(core), before, rtol=1e-5, atol=1e-4)
    merged = load_core(saved, sources=Sources(base=folder), dtype=torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(core.parameters(), merged.parameters(), strict=True))
    question = Conversation.ask("is there a green star?")
    beside = LLM(folder, dtype="float32", device="cpu", adapters={"a": saved}).chat(question, adapter="a")
    assert beside.ids == LLM(saved, base=folder, dtype="float32", device="cpu").chat(question).ids


def test_a_quantised_base_trains_as_its_dense_twin_and_keeps_no_dense_weight(folder: Path) -> None:
    options, _ = KINDS["lora"]
    twin, core = (load_core(folder, dtype=torch.float32) for _ in range(2))
    quantize(core, "nf4_nested", torch.device("cpu"))
    with torch.no_grad():
        weights = dict(twin.named_modules())
        for path, module in core.named_modules():
            if hasattr(module, "quantized"):
                weights[path].weight.copy_(module.quantized.dense(torch.float32))
    found = []
    for model in (core, twin):
        add_lora(model, LoraConfig(**options), torch.Generator().manual_seed(1))
        freeze(model, ("*.lora_*",))
        terms = model.loss_packed(batch())
        terms.sum.backward()
        found.append((terms.sum.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}))
    (ours, our_grads), (theirs, their_grads) = found
    assert torch.equal(ours, theirs)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="quantised"):
        merge_lora(core)


def test_what_cannot_be_adapted_or_held_is_named(folder: Path) -> None:
    core = load_core(folder)
    with pytest.raises(ConfigError, match=r"no product is named like '\*norm\*'"):
        add_lora(core, LoraConfig(rank=2, alpha=1.0, targets=("*norm*",)), torch.Generator())
    add_lora(core, LoraConfig(rank=2, alpha=1.0), torch.Generator())
    freeze(core, ("*.lora_*", "multi_modal_projector.linear_1.weight"))
    with pytest.raises(ConfigError, match=r"cannot hold multi_modal_projector\.linear_1\.weight"):
        check_adapter(core)
    for wrong in ({"rank": 0, "alpha": 1.0}, {"rank": 1, "alpha": 0.0}, {"rank": 1, "alpha": 1.0, "dropout": 1.0}):
        with pytest.raises(ConfigError, match="lora needs"):
            LoraConfig(**wrong)  # type: ignore[arg-type]
