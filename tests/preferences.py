"""Tiny preference pairs: a source of drawn ids with and without pictures, and the same pairs as plain sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from llavakit.geometry import ImageGrid
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.ops.attention import Packed
from llavakit.training.preference import Answered, PreferenceSample
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE

__all__ = ["Pairs", "plain_logprobs"]

_GRID = ImageGrid(4, 4)


class Pairs:
    """Pair i is drawn: a prompt, two answers that may begin alike, every other one with a picture, some with a spoilt one too."""

    def __init__(self, *, pictures: bool = True, spoilt: bool = False) -> None:
        self.pictures, self.spoilt = pictures, spoilt

    def sample(self, index: int) -> PreferenceSample:
        rng = random.Random(f"pair {index}")
        has_picture = self.pictures and index % 2 == 0
        prompt = [1, *_drawn(rng, 2), *[IMAGE_TOKEN] * (NUM_IMAGE_TOKENS if has_picture else 0), *_drawn(rng, rng.randint(1, 6))]
        alike = _drawn(rng, rng.choice((0, 0, 2)))
        chosen = _answered(prompt, [*alike, 5, *_drawn(rng, rng.randint(0, 5))])
        rejected = _answered(prompt, [*alike, 6, *_drawn(rng, rng.randint(0, 7))])
        tiles = torch.randn(int(has_picture), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
        spoilt = tiles * 0.5 if self.spoilt and has_picture else None
        return PreferenceSample(chosen, rejected, tiles, (_GRID,) * int(has_picture), spoilt)


def plain_logprobs(core: LlamaCore | LlavaCore, answered: Answered, tiles: Tensor, grids: Sequence[ImageGrid]) -> Tensor:
    """Score an answer as one sequence, with all logits, by forward_packed and log_softmax."""
    ids_T = torch.tensor(answered.ids)
    features = core.encode_images(tiles, grids) if isinstance(core, LlavaCore) and tiles.shape[0] else None
    x_TD = core.embed(ids_T, features) if isinstance(core, LlavaCore) else core.embed(ids_T)
    attn = Packed(torch.tensor([0, len(ids_T)]), core.text_config.window)
    log_p_TV = core.logits(core.forward_packed(x_TD, torch.arange(len(ids_T)), attn)).log_softmax(-1)
    learned = [place for place in range(1, len(ids_T)) if answered.loss_mask[place]]
    return torch.stack([log_p_TV[place - 1, answered.ids[place]] for place in learned]).sum()


def _drawn(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(7, 300) for _ in range(count)]


def _answered(prompt: Sequence[int], answer: Sequence[int]) -> Answered:
    ids = (*prompt, *answer, 2)
    return Answered(ids, (False,) * len(prompt) + (True,) * (len(ids) - len(prompt)))
