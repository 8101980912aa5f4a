"""Checkpoints against transformers: what it saves loads here, what we save loads there, with the same logits.

The logits of one implementation before and after a round trip through the other are compared bit by bit; ours against
theirs within 1e-4 at a scale near 10 (the parity tests of the model measure that difference itself).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers import LlamaForCausalLM as HfLlamaForCausalLM
from transformers import LlamaModel as HfLlamaModel
from transformers import LlavaForConditionalGeneration as HfLlavaForCausalLM

from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlamaModel, LlavaLlamaForCausalLM
from tests.tiny import IMAGE_TOKEN, VARIANTS, Variant, hf_llama, hf_llava

IMAGE_TOKENS = 16
EAGER = {"attn_implementation": "eager", "output_loading_info": True}
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def llava_input() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 140, (2, 30), generator=generator)
    ids[:, 5 : 5 + IMAGE_TOKENS] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}


def text_input() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 140, (2, 12), generator=torch.Generator().manual_seed(7))}


def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def hf_load(cls: Any, folder: Path) -> Any:
    """Load with transformers and require that it found every tensor and no other."""
    model, report = cls.from_pretrained(folder, **EAGER)
    assert not any(report.values()), report
    return model.eval()


@each_variant
@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_llava_there_and_back(tmp_path: Path, variant: Variant, max_shard_size: str) -> None:
    theirs = hf_llava(variant)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    ours = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert (logits(ours, llava_input()) - logits(theirs, llava_input())).abs().max() < 1e-4
    ours.save_pretrained(tmp_path / "ours", max_shard_size=40_000)
    back = hf_load(HfLlavaForCausalLM, tmp_path / "ours")
    assert torch.equal(logits(back, llava_input()), logits(theirs, llava_input()))


@each_variant
def test_files_of_the_older_families_load_in_both(tmp_path: Path, variant: Variant) -> None:
    """transformers writes family D; after a load from our family A it writes A again."""
    theirs = hf_llava(variant)
    theirs.save_pretrained(tmp_path / "fresh")
    LlavaLlamaForCausalLM.from_pretrained(tmp_path / "fresh").save_pretrained(tmp_path / "ours")
    hf_load(HfLlavaForCausalLM, tmp_path / "ours").save_pretrained(tmp_path / "again")
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "again")
    ours = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for (name, weight), (other, expected) in zip(again.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, expected)


@each_variant
def test_llama_there_and_back(tmp_path: Path, variant: Variant) -> None:
    theirs = hf_llama(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert (logits(ours, text_input()) - logits(theirs, text_input())).abs().max() < 1e-4
    ours.save_pretrained(tmp_path / "ours")
    back = hf_load(HfLlamaForCausalLM, tmp_path / "ours")
    assert torch.equal(logits(back, text_input()), logits(theirs, text_input()))


def test_bare_decoder_there_and_back(tmp_path: Path) -> None:
    theirs = hf_llama()
    theirs.save_pretrained(tmp_path / "with_head")
    theirs.model.save_pretrained(tmp_path / "bare")
    for folder in ("with_head", "bare"):
        ours = LlamaModel.from_pretrained(tmp_path / folder)
        ours.save_pretrained(tmp_path / "ours")
        back = hf_load(HfLlamaModel, tmp_path / "ours")
        assert all(torch.equal(weight, back.get_parameter(name)) for name, weight in theirs.model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_the_dtype_that_we_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    hf_llava().half().save_pretrained(tmp_path / "theirs")
    LlavaLlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=dtype).save_pretrained(tmp_path / "ours")
    assert next(hf_load(HfLlavaForCausalLM, tmp_path / "ours").parameters()).dtype == dtype
    assert AutoConfig.from_pretrained(tmp_path / "ours").dtype == dtype
