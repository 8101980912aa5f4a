"""The packed cores: LlamaCore for text, LlavaCore for text and pictures.

Owns: embed, forward_packed, logits, loss_packed, logprobs_packed, and the rule that placeholders equal features.
Refuses: batch shapes, `forward`, generation and I/O: pretrained/, engine/ and training/ build on these five calls.
Legend: T tokens  D model width  V vocabulary  M chosen rows  F image features  N tiles  P patches  S side in pixels  B segments  A answers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from llavakit.errors import ConfigError, InputError
from llavakit.geometry import ImageGrid, num_tiles
from llavakit.model.anyres import merge_tiles
from llavakit.model.config import LlamaConfig
from llavakit.model.decoder import LlamaDecoder, TokenEmbedding
from llavakit.model.linear import Linear
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.projector import MultiModalProjector
from llavakit.model.vision import VisionTower
from llavakit.ops.attention import Attention, Packed
from llavakit.ops.branches import Branched
from llavakit.ops.loss import IGNORE, linear_cross_entropy, linear_logprobs, sums_by_length

__all__ = [
    "IMAGE_PLACEHOLDER",
    "TOWER_BATCH",
    "AnswerBatch",
    "LlamaCore",
    "LlavaCore",
    "LossTerms",
    "PackedBatch",
    "check_config",
    "check_ids",
]

TOWER_BATCH = 16
"""Tiles that the tower sees at once where no gradient is needed."""
IMAGE_PLACEHOLDER = -200
"""The id that original LLaVA code writes where a picture's features go."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several sequences end to end: labels_T[t] is the token that position t must predict, or -100."""

    ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    pixels_N3SS: Tensor | None = None
    """Tiles of all pictures, in the order of their places."""
    grids: tuple[ImageGrid, ...] | None = None
    """How the tiles belong to pictures; None where each is one."""
    seen_NPD: Tensor | None = None
    """What the tower makes of all tiles, where that is known already, in place of the tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerBatch:
    """Prompts end to end, each followed by the answers that continue it, of which each is scored by itself."""

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    stems_B: Tensor
    """Of each segment the one that it continues, or -1."""
    rows_M: Tensor
    """The positions that predict a token of an answer, answer by answer; several answers may name one."""
    labels_M: Tensor
    """The token that each of them must predict."""
    lengths_A: Tensor
    """How many rows each answer has."""
    pixels_N3SS: Tensor | None = None
    """Tiles of all pictures, in the order of their places."""
    grids: tuple[ImageGrid, ...] | None = None
    """How the tiles belong to pictures; None where each is one."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A loss before division: its float32 sum, the number of supervised positions, and counters to report."""

    sum: Tensor
    weight: Tensor
    metrics: Mapping[str, Tensor]


class LlamaCore(nn.Module):
    """A Llama language model on packed tokens."""

    config_class: ClassVar[type[LlamaConfig]] = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        check_config(config, LlamaConfig, type(self).__name__)
        config.validate()
        self.config = config
        self.model = LlamaDecoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.training_attention: Callable[[Tensor, int | None], Attention] = Packed
        """Makes the attention context of a packed batch from its bounds and the window."""
        config.mark_built()

    @property
    def text_config(self) -> LlamaConfig:
        """The language model's config."""
        return self.config

    def get_input_embeddings(self) -> TokenEmbedding:
        """Return the table of token embeddings."""
        return self.model.embed_tokens

    def embed(self, ids_T: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Look up x_TD, cast to dtype (the weights' own if None). Raises: InputError for ids outside the vocabulary."""
        check_ids(ids_T, self.config.vocab_size)
        x_TD: Tensor = self.model.embed_tokens(ids_T)
        return x_TD if dtype is None else x_TD.to(dtype)

    def forward_packed(self, x_TD: Tensor, positions_T: Tensor, attn: Attention, taps: list[Tensor] | None = None) -> Tensor:
        """Run the decoder; see LlamaDecoder.forward_packed."""
        return self.model.forward_packed(x_TD, positions_T, attn, taps)

    def logprobs_packed(self, batch: AnswerBatch, *, dtype: torch.dtype | None = None) -> Tensor:
        """Sum the log probabilities of each answer's tokens: float32 sums_A, differentiable, activations in dtype."""
        return _decoder_logprobs(self, self.embed(batch.ids_T, dtype=dtype), batch)

    def logits(self, h_MD: Tensor) -> Tensor:
        """Score the vocabulary for M chosen rows: z_MV in h's dtype."""
        z_MV: Tensor = self.lm_head(h_MD)
        return z_MV

    def loss_packed(self, batch: PackedBatch, *, dtype: torch.dtype | None = None) -> LossTerms:
        """Sum the cross entropy over the batch's supervised positions, activations in dtype; the head runs on those rows only."""
        return _decoder_loss(self, self.embed(batch.ids_T, dtype=dtype), batch)


class LlavaCore(nn.Module):
    """Tower, projector and language model on packed tokens; text-only input needs no pictures."""

    config_class: ClassVar[type[LlavaConfig]] = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        check_config(config, LlavaConfig, type(self).__name__)
        config.validate()
        self.config = config
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size)) if config.has_newline else None
        self.language_model = LlamaCore(config.text_config)
        self.get_input_embeddings().follow(config)
        config.mark_built()
        config.vision_config.mark_built()

    @property
    def text_config(self) -> LlamaConfig:
        """The language model's config."""
        return self.config.text_config

    def get_input_embeddings(self) -> TokenEmbedding:
        """Return the language model's table of token embeddings."""
        return self.language_model.get_input_embeddings()

    def encode_images(self, pixels_N3SS: Tensor, grids: Sequence[ImageGrid] | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Turn N tiles into projected features_FD, picture by picture; grids say which tiles are one picture (None: each is).

        Gradients reach the tower only where it is trainable.
        Raises: InputError when the tiles are not those of the grids, of another shape, not floats, or not finite.
        """
        _check_pixels(pixels_N3SS)
        grids = (self.config.image_grid,) * pixels_N3SS.shape[0] if grids is None else grids
        if sum(map(num_tiles, grids)) != pixels_N3SS.shape[0]:
            raise InputError(
                f"{len(grids)} pictures have {sum(map(num_tiles, grids))} tiles, got {pixels_N3SS.shape[0]}; use the model's own processor"
            )
        return self.project(self.see(pixels_N3SS, dtype=dtype), grids)

    def project(self, seen_NPD: Tensor, grids: Sequence[ImageGrid]) -> Tensor:
        """Turn what the tower made of the tiles of pictures into projected features_FD, picture by picture."""
        projected_NPD = self.multi_modal_projector(seen_NPD)
        counts = [num_tiles(grid) for grid in grids]
        if all(count == 1 and grid.anyres is None for count, grid in zip(counts, grids, strict=True)):
            return projected_NPD.flatten(0, 1)  # type: ignore[no-any-return]
        pictures = zip(projected_NPD.split(counts), grids, strict=True)
        return torch.cat([merge_tiles(tiles_NPD, grid, self.image_newline) for tiles_NPD, grid in pictures])

    def see(self, pixels_N3SS: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Run the tower on N tiles, a few at a time where no gradient is needed: the projector's seen_NPD."""
        is_tower_trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.vision_tower.parameters())
        pixels_N3SS = pixels_N3SS.to(self.vision_tower.dtype if dtype is None else dtype)
        parts = (pixels_N3SS,) if is_tower_trained or not pixels_N3SS.shape[0] else pixels_N3SS.split(TOWER_BATCH)
        with torch.set_grad_enabled(is_tower_trained):
            depths, keep_cls = self.config.feature_depths, self.config.image_grid.has_cls
            seen = [self.vision_tower.features(part, depths=depths, keep_cls=keep_cls) for part in parts]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def embed(self, ids_T: Tensor, features_FD: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Look up x_TD and put the features, in order, where ids are the image token (or -200).

        Raises: InputError when placeholders and features differ in number, or ids lie outside the vocabulary.
        """
        is_image_T = ids_T == IMAGE_PLACEHOLDER
        if self.config.image_token_index is not None:
            is_image_T |= ids_T == self.config.image_token_index
        num_slots, num_features = int(is_image_T.sum()), 0 if features_FD is None else features_FD.shape[0]
        if num_slots != num_features:
            raise InputError(
                f"the prompt has {num_slots} image positions but the pictures give {num_features} features; "
                "build the prompt with the processor, which writes one position per feature"
            )
        if features_FD is None:
            return self.language_model.embed(ids_T, dtype=dtype)
        # The image token may lie outside the embedding, and -200 always does: look up row 0 there.
        x_TD = self.language_model.embed(ids_T.masked_fill(is_image_T, 0), dtype=dtype)
        return x_TD.index_put((is_image_T.nonzero().squeeze(-1),), features_FD.to(x_TD.dtype))

    def forward_packed(self, x_TD: Tensor, positions_T: Tensor, attn: Attention, taps: list[Tensor] | None = None) -> Tensor:
        """Run the language model's decoder; see LlamaDecoder.forward_packed."""
        return self.language_model.forward_packed(x_TD, positions_T, attn, taps)

    def logprobs_packed(self, batch: AnswerBatch, *, dtype: torch.dtype | None = None, touch: bool = False) -> Tensor:
        """Sum the log probabilities of each answer's tokens as LlamaCore does, each picture seen once for all answers to it.

        With touch every part gets a gradient, as in loss_packed.
        """
        features_FD = None if batch.pixels_N3SS is None else self.encode_images(batch.pixels_N3SS, batch.grids, dtype=dtype)
        sums_A = _decoder_logprobs(self.language_model, self.embed(batch.ids_T, features_FD, dtype=dtype), batch)
        return sums_A + self._nothing(batch, dtype) if touch else sums_A

    def logits(self, h_MD: Tensor) -> Tensor:
        """Score the vocabulary for M chosen rows."""
        return self.language_model.logits(h_MD)

    def loss_packed(self, batch: PackedBatch, *, dtype: torch.dtype | None = None, touch: bool = False) -> LossTerms:
        """Sum the cross entropy over the batch's supervised positions, pictures included, activations in dtype.

        With touch every part gets a gradient, of zeros where the batch has no picture for it, as processes that train together need.
        """
        if batch.seen_NPD is not None:
            seen_NPD, grids = batch.seen_NPD, (self.config.image_grid,) * batch.seen_NPD.shape[0] if batch.grids is None else batch.grids
            features_FD: Tensor | None = self.project(seen_NPD if dtype is None else seen_NPD.to(dtype), grids)
        else:
            features_FD = None if batch.pixels_N3SS is None else self.encode_images(batch.pixels_N3SS, batch.grids, dtype=dtype)
        terms = _decoder_loss(self.language_model, self.embed(batch.ids_T, features_FD, dtype=dtype), batch)
        return replace(terms, sum=terms.sum + self._nothing(batch, dtype)) if touch else terms

    def _nothing(self, batch: PackedBatch | AnswerBatch, dtype: torch.dtype | None) -> Tensor:
        """Return a zero that depends on tower, projector and newline."""
        side = self.config.vision_config.image_size
        nothing = batch.ids_T.new_zeros((), dtype=torch.float32)
        has_seen = isinstance(batch, PackedBatch) and batch.seen_NPD is not None
        if batch.pixels_N3SS is None and not has_seen:
            blank_13SS = torch.zeros(1, 3, side, side, device=batch.ids_T.device)
            nothing = nothing + 0.0 * self.encode_images(blank_13SS, dtype=dtype).sum().float()
        return nothing if self.image_newline is None else nothing + 0.0 * self.image_newline.sum()


def check_config(config: object, wanted: type, owner: str) -> None:
    """Check that a model is built from its own kind of config. Raises: ConfigError."""
    if not isinstance(config, wanted):
        raise ConfigError(f"{owner} is built from a {wanted.__name__}, got {type(config).__name__}")


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Check that ids can be looked up; on CUDA this waits for the device. Raises: InputError.

    On CUDA a look-up outside the table would end the process, not just the call.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"ids must be integers, got {ids.dtype}; use the tokenizer's tensor")
    if ids.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= vocab_size:
        raise InputError(f"ids must lie in 0..{vocab_size - 1}, got {low}..{high}; does the tokenizer belong to this model?")


def _check_pixels(pixels: Tensor) -> None:
    """Check dtype and values; on CUDA this waits for the device. Raises: InputError."""
    if not pixels.is_floating_point():
        raise InputError(f"pixels must be normalised floats, got {pixels.dtype}; use the model's own processor")
    # NaN anywhere is both the smallest and the largest value: one pass, no copy.
    if pixels.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(pixels)).tolist())):
        raise InputError("pixels hold NaN or infinite values; use the model's own processor")


def _decoder_loss(core: LlamaCore, x_TD: Tensor, batch: PackedBatch) -> LossTerms:
    h_TD = core.forward_packed(x_TD, batch.positions_T, core.training_attention(batch.cu_seqlens, core.config.window))
    rows_M = (batch.labels_T != IGNORE).nonzero().squeeze(-1)
    loss, num_right = linear_cross_entropy(h_TD[rows_M], core.lm_head.weight, batch.labels_T[rows_M])
    weight = torch.tensor(rows_M.numel())
    return LossTerms(loss, weight, {"num_supervised": weight, "num_right": num_right})


def _decoder_logprobs(core: LlamaCore, x_TD: Tensor, batch: AnswerBatch) -> Tensor:
    h_TD = core.forward_packed(x_TD, batch.positions_T, Branched(batch.cu_seqlens, batch.stems_B, core.config.window))
    return sums_by_length(linear_logprobs(h_TD[batch.rows_M], core.lm_head.weight, batch.labels_M), batch.lengths_A)
