"""How much arithmetic a training step is, and how much a device could do: from them its share of the peak (MFU).

Owns: CoreFlops and peak_flops. Counts products of matrices only, of real tokens only (padding is waste), the tower's too; attention counts
what a causal mask leaves. A trained weight takes 6 operations a token, a frozen one through which gradients pass 4, any other 2.
Source: the usual accounting (PaLM, appendix B), with the causal half and the tower.
Legend: T tokens  M supervised rows  N tiles  D model width  L layers  P patches of a tile
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import nn

from llavakit.model.config import LlamaConfig
from llavakit.model.linear import QuantizedLinear
from llavakit.model.llava import LlamaCore, LlavaCore, PackedBatch
from llavakit.ops.loss import IGNORE

__all__ = ["CoreFlops", "peak_flops"]

_PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "A10": 125e12}
"""Dense bfloat16 operations per second by the makers' data sheets; names stand in torch's device names."""
_SIDE, _REPEATS = 1024, 8


class CoreFlops:
    """Counts the operations of a batch for one model and what trains of it."""

    def __init__(self, core: LlamaCore | LlavaCore) -> None:
        """Look at which parameters train now."""
        self._core = core
        language = core.language_model if isinstance(core, LlavaCore) else core
        is_passed_through = isinstance(core, LlavaCore) and (_trains(core.multi_modal_projector) or _trains(core.vision_tower))
        self._layers = _matrix_numbers(language.model.layers)
        self._layer_factor = _factor(language.model.layers, has_gradient=is_passed_through)
        self._head_factor = _factor(language.lm_head, has_gradient=is_passed_through or _trains(language.model))

    def batch(self, batch: PackedBatch) -> float:
        """Count forward and backward of one batch; a filler at its end counts nothing."""
        config: LlamaConfig = self._core.text_config
        lengths = _lengths(batch)
        num_tokens, num_pairs = sum(lengths), sum(length * (length + 1) / 2 for length in lengths)
        width = config.num_attention_heads * config.head_width
        attention = 2 * 2 * config.num_hidden_layers * width * num_pairs
        layers = self._layer_factor * (self._layers * num_tokens + attention / 2)
        head = self._head_factor * config.vocab_size * config.hidden_size * int((batch.labels_T != IGNORE).sum())
        return layers + head + self._pictures(batch)

    def _pictures(self, batch: PackedBatch) -> float:
        core = self._core
        if not isinstance(core, LlavaCore) or batch.pixels_N3SS is None:
            return 0.0
        vision, num_tiles = core.config.vision_config, batch.pixels_N3SS.shape[0]
        num_patches = (vision.image_size // vision.patch_size) ** 2 + int(vision.has_cls)
        per_tile = _matrix_numbers(core.vision_tower) * num_patches
        per_tile += 2 * vision.num_hidden_layers * vision.hidden_size * num_patches**2
        projector = _factor(core.multi_modal_projector, has_gradient=_trains(core.vision_tower)) * _matrix_numbers(
            core.multi_modal_projector
        )
        return num_tiles * (_factor(core.vision_tower, has_gradient=False) * per_tile + projector * num_patches)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second that a device can do: a GPU's data sheet, else what a product of matrices reaches here now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in _PEAKS.items() if part in name), None)
        if known is not None:
            return known
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best


def _lengths(batch: PackedBatch) -> Sequence[int]:
    bounds = batch.cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    # A filler, which rounds a batch up, is the one segment in which nothing is supervised and every id is 0.
    is_filler = bool(lengths) and not batch.ids_T[bounds[-2] :].any() and not (batch.labels_T[bounds[-2] :] != IGNORE).any()
    return lengths[:-1] if is_filler else lengths


def _matrix_numbers(module: nn.Module) -> int:
    """Count the numbers by which a token (or patch) is multiplied; adapters, which are thin, are left out."""
    products = [part for part in module.modules() if isinstance(part, nn.Linear | QuantizedLinear)]
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    return sum(part.in_features * part.out_features for part in products) + sum(part.weight.numel() for part in convolutions)


def _trains(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _factor(module: nn.Module, *, has_gradient: bool) -> int:
    if all(weight.requires_grad for weight in module.parameters() if weight.dim() > 1):
        return 6
    return 4 if has_gradient or _trains(module) else 2
