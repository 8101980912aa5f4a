"""What tests of LoRA share: factors that do something, and a batch of a picture's sequence and one of text alone."""

from __future__ import annotations

import torch
from torch import nn

from llavakit.model.llava import IMAGE_PLACEHOLDER, PackedBatch
from llavakit.model.lora_config import LoraConfig
from llavakit.model.surgery import add_lora
from llavakit.ops.loss import IGNORE
from tests.tiny import NUM_IMAGE_TOKENS, NUM_PIECES, SIDE

__all__ = ["add_random_lora", "mixed_batch"]


def add_random_lora(model: nn.Module, config: LoraConfig, seed: int = 7) -> list[str]:
    """Add factors of which B is not zero, and return the names of their products."""
    generator = torch.Generator().manual_seed(seed)
    names = add_lora(model, config, generator)
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).get_parameter("lora_B").normal_(0.0, 0.1, generator=generator)
    return names


def mixed_batch(*, has_picture: bool = True) -> PackedBatch:
    """Build two sequences, the first with a picture if asked for; the last eleven tokens of each are learnt."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, NUM_PIECES, (length,), generator=generator) for length in (20, 14)]
    places = torch.full((NUM_IMAGE_TOKENS if has_picture else 0,), IMAGE_PLACEHOLDER)
    ids = [torch.cat((texts[0][:4], places, texts[0][4:])), texts[1]]
    labels = []
    for row in ids:
        following = torch.cat((row[1:], torch.tensor([IGNORE])))
        following[:-12] = IGNORE
        labels.append(following)
    return PackedBatch(
        ids_T=torch.cat(ids),
        labels_T=torch.cat(labels),
        positions_T=torch.cat([torch.arange(row.numel()) for row in ids]),
        cu_seqlens=torch.tensor([0, ids[0].numel(), ids[0].numel() + ids[1].numel()]),
        pixels_N3SS=torch.randn(1, 3, SIDE, SIDE, generator=generator) if has_picture else None,
    )
