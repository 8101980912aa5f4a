"""Pre-training of the miniature's tower: what CLIP's pre-training is for LLaVA.

Owns: dense targets made from labelled boxes, the heads that are thrown away afterwards, their loss.
Each patch that lies on a thing learns what it is, its colour and its box. The heads read the two last layers, so that the
features LLaVA takes (the second to last) carry it all.
Legend: N pictures  P patches  D tower width  C classes
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from llavakit.geometry import pad_offset
from llavakit.model.linear import LayerNorm, Linear
from llavakit.model.llava import LossTerms
from llavakit.model.vision import VisionTower
from llavakit.model.vision_config import VisionConfig
from llavakit.processing.image import ImageProcessor
from llavakit.reproduce.pictures import draw_picture
from llavakit.training.data import Drawn
from llavakit.world.scenes import COLORS, DIGITS, LETTERS, SHAPES, Scene

__all__ = ["TowerBatch", "TowerSource", "TowerTrainer", "dense_targets"]

_NAMES = (*SHAPES, *(f"digit {name}" for name in DIGITS), *(f"letter {name}" for name in LETTERS))
_NAME_INDEX = {name: index + 1 for index, name in enumerate(_NAMES)}  # 0 is the background
_COLOR_INDEX = {color: index for index, color in enumerate(COLORS)}
_HEAD_WIDTHS = (1 + len(_NAMES), len(COLORS), 1, 4)
_IGNORE = -100
_REACH = 0.25  # a patch belongs to a thing when its centre is inside the box grown by this share of a patch


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """What each of P patches should know: name class, colour class (-100 on background), is_center, box relative to the patch."""

    names_P: np.ndarray
    colors_P: np.ndarray
    centers_P: np.ndarray
    boxes_P4: np.ndarray


@dataclass(frozen=True, slots=True)
class TowerBatch:
    """Pictures and their dense targets, stacked."""

    pixels_N3SS: Tensor
    names_NP: Tensor
    colors_NP: Tensor
    centers_NP: Tensor
    boxes_NP4: Tensor


def dense_targets(scene: Scene, size: tuple[int, int], patches_per_side: int) -> DenseTargets:
    """Label the patches of a padded square tile from a scene's boxes; size is the picture's (width, height) in pixels."""
    width, height = size
    side = max(size)
    offset_x, offset_y = pad_offset(width, height)
    steps = (np.arange(patches_per_side) + 0.5) / patches_per_side
    x_P, y_P = np.tile(steps, patches_per_side), np.repeat(steps, patches_per_side)
    count = patches_per_side**2
    targets = DenseTargets(
        np.zeros(count, np.int64), np.full(count, _IGNORE), np.zeros(count, np.float32), np.zeros((count, 4), np.float32)
    )
    nearest_P = np.full(count, np.inf)
    reach = _REACH / patches_per_side
    for thing in scene.things:
        x0, y0, x1, y1 = scene.box(thing)
        x0, x1 = (offset_x + x0 * width) / side, (offset_x + x1 * width) / side
        y0, y1 = (offset_y + y0 * height) / side, (offset_y + y1 * height) / side
        targets.centers_P[_patch_at((x0 + x1) / 2, (y0 + y1) / 2, patches_per_side)] = 1.0
        box_4 = np.array((x0, y0, x1, y1), np.float32)
        characters = thing.name if thing.kind == "word" else (thing.name,)
        pitch = (x1 - x0) * 6 / (6 * len(characters) - 1) if thing.kind == "word" else x1 - x0
        for position, character in enumerate(characters):
            left = x0 + position * pitch
            right = left + (pitch * 5 / 6 if thing.kind == "word" else pitch)
            name = character if thing.kind == "shape" else f"{'digit' if thing.kind == 'digit' else 'letter'} {character}"
            is_on_P = (x_P > left - reach) & (x_P < right + reach) & (y_P > y0 - reach) & (y_P < y1 + reach)
            is_on_P[_patch_at((left + right) / 2, (y0 + y1) / 2, patches_per_side)] = True
            distance_P = np.hypot(x_P - (left + right) / 2, y_P - (y0 + y1) / 2)
            is_ours_P = is_on_P & (distance_P < nearest_P)
            nearest_P[is_ours_P] = distance_P[is_ours_P]
            targets.names_P[is_ours_P] = _NAME_INDEX[name]
            targets.colors_P[is_ours_P] = _COLOR_INDEX[thing.color]
            targets.boxes_P4[is_ours_P] = box_4 - np.stack((x_P, y_P, x_P, y_P), 1)[is_ours_P]
    return targets


@dataclass(frozen=True, slots=True)
class TowerSource:
    """Batches of fresh pictures with their targets; batch n holds pictures n * size and following."""

    seed: int
    size: int
    processor: ImageProcessor
    patches_per_side: int

    def batch(self, number: int) -> Drawn:
        """Draw, render and label one batch."""
        pictures = [draw_picture(random.Random(self.seed + number * self.size + index)) for index in range(self.size)]
        targets = [dense_targets(picture.scene, picture.image.size, self.patches_per_side) for picture in pictures]
        batch = TowerBatch(
            torch.cat([self.processor.apply(picture.image) for picture in pictures]),
            torch.from_numpy(np.stack([target.names_P for target in targets])),
            torch.from_numpy(np.stack([target.colors_P for target in targets])),
            torch.from_numpy(np.stack([target.centers_P for target in targets])),
            torch.from_numpy(np.stack([target.boxes_P4 for target in targets])),
        )
        return Drawn(batch, self.size, 0)


def _patch_at(x: float, y: float, patches_per_side: int) -> int:
    return min(patches_per_side - 1, int(y * patches_per_side)) * patches_per_side + min(patches_per_side - 1, int(x * patches_per_side))


class TowerTrainer(nn.Module):
    """A tower with one linear head on each of its two last layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.num_layers = config.num_hidden_layers
        num_outputs = sum(_HEAD_WIDTHS)
        self.heads = nn.ModuleList(_Head(config.hidden_size, num_outputs, config.layer_norm_eps) for _ in range(2))

    def loss_packed(self, batch: TowerBatch, *, dtype: torch.dtype | None = None) -> LossTerms:
        """Sum the losses of all patches and heads; the weight is the number of patches."""
        pixels = batch.pixels_N3SS if dtype is None else batch.pixels_N3SS.to(dtype)
        states = self.vision_tower.hidden_states(pixels, self.num_layers)[-2:]
        total, metrics = torch.zeros(()), dict[str, Tensor]()
        for head, state in zip(reversed(self.heads), reversed(states), strict=True):
            loss, metrics = _dense_loss(head(state[:, 1:].float()), batch)
            total = total + loss
        return LossTerms(total, torch.tensor(batch.names_NP.numel()), metrics)


class _Head(nn.Module):
    def __init__(self, width: int, num_outputs: int, eps: float) -> None:
        super().__init__()
        self.norm, self.out = LayerNorm(width, eps), Linear(width, num_outputs)

    def forward(self, x_NPD: Tensor) -> Tensor:
        return self.out(self.norm(x_NPD))  # type: ignore[no-any-return]


def _dense_loss(out_NPC: Tensor, batch: TowerBatch) -> tuple[Tensor, dict[str, Tensor]]:
    names_NPC, colors_NPC, centers_NP, boxes_NP4 = out_NPC.split(_HEAD_WIDTHS, -1)
    is_thing_NP = batch.names_NP > 0
    losses = (
        nn.functional.cross_entropy(names_NPC.flatten(0, 1), batch.names_NP.flatten(), reduction="sum"),
        nn.functional.cross_entropy(colors_NPC.flatten(0, 1), batch.colors_NP.flatten(), ignore_index=_IGNORE, reduction="sum"),
        nn.functional.binary_cross_entropy_with_logits(centers_NP.squeeze(-1), batch.centers_NP, reduction="sum"),
        5.0 * ((boxes_NP4 - batch.boxes_NP4).abs().sum(-1) * is_thing_NP).sum(),
    )
    metrics = {
        "num_things": is_thing_NP.sum(),
        "num_right_names": ((names_NPC.argmax(-1) == batch.names_NP) & is_thing_NP).sum(),
        "num_right_colors": ((colors_NPC.argmax(-1) == batch.colors_NP) & is_thing_NP).sum(),
    }
    return torch.stack(losses).sum(), metrics
