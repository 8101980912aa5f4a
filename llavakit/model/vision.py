"""The CLIP vision tower, as deep as its features need.

Owns: CLIP's patch embedding and encoder with HF's parameter names. Refuses: pixels of the wrong size.
hidden_states[0] is the output of pre_layrnorm (the spelling is the checkpoint's); post_layernorm is held but never run.
Legend: N pictures  P patches + 1 class token  D width  S side in pixels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.errors import InputError
from llavakit.model.config import ClipVisionConfig
from llavakit.model.linear import Embedding, LayerNorm, Linear
from llavakit.ops.attention import fused_attention

__all__ = ["ClipVisionTower"]


class PatchConvolution(nn.Conv2d):
    """One product per patch, without its own initialisation."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class PatchEmbedding(nn.Module):
    """Class token, patches, positions."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchConvolution(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = Embedding(config.num_patches + 1, config.hidden_size)

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """Embed each picture as x_NPD."""
        dtype = pixels_N3SS.dtype
        patches = F.conv2d(pixels_N3SS, self.patch_embedding.weight.to(dtype), stride=self.patch_embedding.stride)
        classes = self.class_embedding.to(dtype).expand(pixels_N3SS.shape[0], 1, -1)
        return torch.cat((classes, patches.flatten(2).transpose(1, 2)), 1) + self.position_embedding.weight.to(dtype)


class TowerAttention(nn.Module):
    """Full attention with biases."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Attend among the patches of each picture."""
        q, k, v = (proj(x_NPD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(fused_attention(q, k, v).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class QuickGeluMlp(nn.Module):
    """fc2(quick_gelu(fc1(x))) with quick_gelu(x) = x * sigmoid(1.702 x)."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Apply the block patch by patch."""
        h = self.fc1(x_NPD)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # type: ignore[no-any-return]


class TowerLayer(nn.Module):
    """One pre-norm layer of the tower."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = TowerAttention(config), QuickGeluMlp(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Return the stream after this layer."""
        x_NPD = x_NPD + self.self_attn(self.layer_norm1(x_NPD))
        return x_NPD + self.mlp(self.layer_norm2(x_NPD))  # type: ignore[no-any-return]


class TowerEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """The part of CLIP that checkpoints call vision_model."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbedding(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = TowerEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)


class ClipVisionTower(nn.Module):
    """A CLIP vision model that hands out the hidden states LLaVA reads."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.image_size, self.num_channels = config.image_size, config.num_channels
        self.vision_model = VisionTransformer(config)

    def hidden_states(self, pixels_N3SS: Tensor, num_layers: int) -> list[Tensor]:
        """Run num_layers layers and return their num_layers + 1 hidden states x_NPD, class token first.

        Raises: InputError when the pixels are not [N, channels, image_size, image_size].
        """
        expected = (self.num_channels, self.image_size, self.image_size)
        if pixels_N3SS.dim() != 4 or tuple(pixels_N3SS.shape[1:]) != expected:
            raise InputError(
                f"pixels must be [N, {', '.join(map(str, expected))}], got {list(pixels_N3SS.shape)}; use the model's own processor"
            )
        states = [self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels_N3SS))]
        for depth in range(num_layers):
            states.append(self.vision_model.encoder.layers[depth](states[-1]))
        return states

    def features(self, pixels_N3SS: Tensor, *, num_layers: int, keep_cls: bool) -> Tensor:
        """Return the last of num_layers hidden states, without the class token unless keep_cls."""
        x_NPD = self.hidden_states(pixels_N3SS, num_layers)[-1]
        return x_NPD if keep_cls else x_NPD[:, 1:]
