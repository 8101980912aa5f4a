"""Wrong inputs of forward and generate: one InputError that names the argument, before any layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llavakit.errors import InputError
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE, VARIANTS, VOCAB, llama, llama_config, llava

IDS = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 3]])
PIXELS = torch.zeros(1, 3, SIDE, SIDE)
EXPANDED = torch.tensor([[1, *[IMAGE_TOKEN] * NUM_IMAGE_TOKENS, 5]])
SHAPE, WIDTH = (2, 4), 64


@pytest.fixture(autouse=True)
def nothing_is_computed() -> Iterator[None]:
    """Fail where a decoder layer, or a linear layer of the tower, runs."""

    def refuse(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert not isinstance(module, nn.Linear), "a layer ran before the inputs were checked"

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    yield
    handle.remove()


@pytest.fixture(scope="module")
def models() -> tuple[LlamaModel | LlamaForCausalLM | LlavaLlamaForCausalLM, ...]:
    return LlamaModel(llama_config()), llama(), llava()


def cache(layers: int = 2, rows: int = 2, heads: int = 2, past: int = 3, width: int = 16) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((torch.zeros(rows, heads, past, width), torch.zeros(rows, heads, past, width)) for _ in range(layers))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ids above": ({"input_ids": IDS + VOCAB}, rf"ids must lie in 0\.\.{VOCAB - 1}, got {VOCAB + 1}\.\."),
    "ids below": ({"input_ids": IDS - 2}, r"ids must lie in 0\.\..*, got -1\.\."),
    "ids float": ({"input_ids": IDS.float()}, r"input_ids must be integers \[B, S\] .*, got float32 \[2, 4\]"),
    "ids bool": ({"input_ids": IDS.bool()}, "input_ids must be integers"),
    "ids flat": ({"input_ids": IDS[0]}, r"input_ids must be integers .*, got int64 \[4\]"),
    "ids empty": ({"input_ids": IDS[:, :0]}, "at least one position"),
    "ids no rows": ({"input_ids": IDS[:0]}, "at least one position"),
    "embeds width": ({"inputs_embeds": torch.zeros(2, 4, 63)}, r"inputs_embeds must be floats \[B, S, 64\] .*, got float32 \[2, 4, 63\]"),
    "embeds flat": ({"inputs_embeds": torch.zeros(4, 64)}, "inputs_embeds must be floats"),
    "embeds int": ({"inputs_embeds": torch.zeros(2, 4, 64, dtype=torch.int64)}, "inputs_embeds must be floats"),
    "embeds empty": ({"inputs_embeds": torch.zeros(2, 0, 64)}, "at least one position"),
    "mask short": ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, r"attention_mask must be \[2, 4\].*, got \[2, 3\]"),
    "mask rows": ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, r"attention_mask must be \[2, 4\]"),
    "mask 4d": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask must be \[2, 4\]"),
    "mask additive": ({"input_ids": IDS, "attention_mask": torch.full(SHAPE, -1e9)}, "attention_mask must be 1 where a token counts"),
    "mask two": ({"input_ids": IDS, "attention_mask": torch.full(SHAPE, 2)}, "attention_mask must be 1 where"),
    "mask nan": ({"input_ids": IDS, "attention_mask": torch.full(SHAPE, torch.nan)}, "attention_mask must be 1 where"),
    "mask without past": (
        {"input_ids": IDS, "attention_mask": torch.ones(SHAPE), "past_key_values": cache()},
        r"attention_mask must be \[2, 7\] \(cached and new",
    ),
    "positions below": ({"input_ids": IDS, "position_ids": IDS - 2}, "position_ids must be 0 or more, got -1"),
    "positions float": ({"input_ids": IDS, "position_ids": IDS.float()}, r"position_ids must be integers \[2, 4\] .*, got float32"),
    "positions short": ({"input_ids": IDS, "position_ids": IDS[:, :3]}, r"position_ids must be integers \[2, 4\] .*, got int64 \[2, 3\]"),
    "positions rows": ({"input_ids": IDS, "position_ids": torch.zeros(3, 4, dtype=torch.int64)}, "position_ids must be integers"),
    "past layers": ({"input_ids": IDS, "past_key_values": cache(layers=3)}, r"must be 2 layers .* \[2, 2, C, 16\], got 3 of"),
    "past rows": ({"input_ids": IDS, "past_key_values": cache(rows=1)}, r"got 2 of \[\[1, 2, 3, 16\]\]; take those"),
    "past heads": ({"input_ids": IDS, "past_key_values": cache(heads=4)}, r"got 2 of \[\[2, 4, 3, 16\]\]"),
    "past width": ({"input_ids": IDS, "past_key_values": cache(width=8)}, r"got 2 of \[\[2, 2, 3, 8\]\]"),
    "past lengths": ({"input_ids": IDS, "past_key_values": (*cache(1), *cache(1, past=4))}, "past_key_values must be 2 layers"),
    "past flat": ({"input_ids": IDS, "past_key_values": (torch.zeros(2), torch.zeros(2))}, "past_key_values must be"),
    "past empty": ({"input_ids": IDS, "past_key_values": ()}, "past_key_values must be 2 layers"),
    "past other": ({"input_ids": IDS, "past_key_values": 3}, "past_key_values must be one pair"),
}
WRONG_LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "labels short": ({"labels": IDS[:, :3]}, r"labels must be integers \[2, 4\] like the ids, got int64 \[2, 3\]"),
    "labels float": ({"labels": IDS.float()}, "labels must be integers"),
    "labels above": ({"labels": IDS + VOCAB}, rf"labels must be -100 \(no loss\) or ids in 0\.\.{VOCAB - 1}, got"),
    "labels below": ({"labels": IDS - 2}, r"labels must be -100 .*, got -1\.\.7"),
}
WRONG_PICTURES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"input_ids": EXPANDED}, "16 image positions but the pictures give 0"),
    "embeds": ({"inputs_embeds": torch.zeros(1, 4, WIDTH), "images": PIXELS}, "pictures go where input_ids have image ids"),
    "both": ({"input_ids": EXPANDED, "images": PIXELS, "pixel_values": PIXELS}, "the same thing"),
    "several shapes": (
        {"input_ids": EXPANDED, "images": [PIXELS[0], PIXELS[0, :, 1:]]},
        r"all tiles must have one shape, got \[\(3, 27, 28\), \(3, 28, 28\)\]",
    ),
    "empty list": ({"input_ids": EXPANDED, "images": []}, "at least one picture"),
    "bytes": ({"input_ids": EXPANDED, "images": PIXELS.byte()}, "pixels must be normalised floats, got torch.uint8"),
    "nan": ({"input_ids": EXPANDED, "images": PIXELS * torch.nan}, "pixels hold NaN"),
    "side": ({"input_ids": EXPANDED, "images": PIXELS[..., 1:]}, r"pixels must be \[N, 3, 28, 28\], got"),
    "one picture": ({"input_ids": EXPANDED, "images": PIXELS[0]}, "pictures must be"),
    "mask of a placeholder": (
        {"input_ids": torch.tensor([[1, -200, 5]]), "images": PIXELS, "attention_mask": torch.ones(1, 18)},
        r"attention_mask must be \[1, 3\] like the ids, whose image ids are still to be expanded, got \[1, 18\]",
    ),
    "labels of a placeholder": (
        {"input_ids": torch.tensor([[1, -200, 5]]), "images": PIXELS, "labels": torch.ones(1, 18, dtype=torch.int64)},
        r"labels must be \[1, 3\] like the ids",
    ),
    "positions of a placeholder": (
        {"input_ids": torch.tensor([[1, -200, 5]]), "images": PIXELS, "position_ids": torch.arange(3)[None]},
        r"position_ids must be integers \[1, 18\] \(image ids standing alone count as all",
    ),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(models: tuple[nn.Module, ...], arguments: dict[str, Any], told: str) -> None:
    for model in models:
        with pytest.raises(InputError, match=told):
            model(**arguments)


@pytest.mark.parametrize(("arguments", "told"), WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
def test_wrong_labels_are_named(models: tuple[nn.Module, ...], arguments: dict[str, Any], told: str) -> None:
    for model in models[1:]:
        with pytest.raises(InputError, match=told):
            model(input_ids=IDS, **arguments)


@pytest.mark.parametrize(("arguments", "told"), WRONG_PICTURES.values(), ids=WRONG_PICTURES.keys())
def test_wrong_pictures_are_named(models: tuple[nn.Module, ...], arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        models[2](**arguments)


@pytest.mark.parametrize("name", ["ids above", "ids below", "ids float"])
def test_generate_refuses_them_too(name: str) -> None:
    arguments, told = WRONG[name]
    with pytest.raises(InputError, match=told):
        llava().generate(**arguments)


def test_a_cache_of_another_model_is_refused() -> None:
    other = llama(VARIANTS[0])
    past = tuple((torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3, 16)) for _ in range(other.config.num_hidden_layers))
    with pytest.raises(InputError, match="take those that a forward of this model returned"):
        llama()(input_ids=IDS, past_key_values=past)


class TestRight:
    """What looks unusual and is right; here layers run."""

    @pytest.fixture(autouse=True)
    def nothing_is_computed(self) -> None:
        """Replace the module's fixture."""

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32, torch.bfloat16])
    def test_masks_of_every_dtype(self, dtype: torch.dtype) -> None:
        assert llama()(input_ids=IDS, attention_mask=torch.ones(SHAPE, dtype=dtype)).logits.isfinite().all()

    @pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4)])
    def test_positions_of_every_shape(self, shape: tuple[int, ...]) -> None:
        model, positions = llama(), torch.arange(4).expand(shape)
        assert torch.equal(model(input_ids=IDS, position_ids=positions).logits, model(input_ids=IDS).logits)

    def test_short_integers_and_ignored_labels(self) -> None:
        output = llama()(input_ids=IDS.int(), labels=torch.where(IDS > 5, IDS, -100).int())
        assert output.loss.isfinite()

    def test_a_returned_cache_as_a_list(self) -> None:
        model = llama()
        past = [list(pair) for pair in model(input_ids=IDS[:, :2]).past_key_values]
        assert torch.allclose(model(input_ids=IDS[:, 2:], past_key_values=past).logits, model(input_ids=IDS).logits[:, 2:], atol=1e-4)
