"""The vision tower, CLIP or SigLIP, as deep as its features need.

Owns: patch embedding and encoder with HF's parameter names. Refuses: pixels of the wrong size.
hidden_states[0] is the embedding, in CLIP after pre_layrnorm (the spelling is the checkpoint's). post_layernorm is held, so that
files stay whole, but never run: LLaVA reads hidden states from before it. SigLIP has no class token and no pre_layrnorm.
Legend: N pictures  P patches + 1 class token  D width  S side in pixels
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.errors import InputError
from llavakit.model.linear import Embedding, LayerNorm, Linear
from llavakit.model.vision_config import VisionConfig
from llavakit.ops.attention import fused_attention

__all__ = ["VisionTower"]


def quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x), OpenAI's approximation of gelu."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class PatchConvolution(nn.Conv2d):
    """One product per patch, without its own initialisation."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class PatchEmbedding(nn.Module):
    """Class token where there is one, patches, positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.has_cls else None
        self.patch_embedding = PatchConvolution(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size, bias=config.has_patch_bias
        )
        self.position_embedding = Embedding(config.num_patches + int(config.has_cls), config.hidden_size)

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """Embed each picture as x_NPD."""
        dtype, bias = pixels_N3SS.dtype, self.patch_embedding.bias
        patches = F.conv2d(
            pixels_N3SS, self.patch_embedding.weight.to(dtype), None if bias is None else bias.to(dtype), stride=self.patch_embedding.stride
        )
        x_NPD = patches.flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x_NPD = torch.cat((self.class_embedding.to(dtype).expand(pixels_N3SS.shape[0], 1, -1), x_NPD), 1)
        return x_NPD + self.position_embedding.weight.to(dtype)


class TowerAttention(nn.Module):
    """Full attention with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Attend among the patches of each picture."""
        q, k, v = (proj(x_NPD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(fused_attention(q, k, v).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class TowerMlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Apply the block patch by patch."""
        return self.fc2(self.act(self.fc1(x_NPD)))  # type: ignore[no-any-return]


class TowerLayer(nn.Module):
    """One pre-norm layer of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = TowerAttention(config), TowerMlp(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Return the stream after this layer."""
        x_NPD = x_NPD + self.self_attn(self.layer_norm1(x_NPD))
        return x_NPD + self.mlp(self.layer_norm2(x_NPD))  # type: ignore[no-any-return]


class TowerEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """What checkpoints call vision_model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbedding(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps) if config.has_pre_norm else None
        self.encoder = TowerEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)


class VisionTower(nn.Module):
    """A vision model that hands out the hidden states LLaVA reads."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size, self.num_channels, self.has_cls = config.image_size, config.num_channels, config.has_cls
        self.vision_model = VisionTransformer(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.vision_model.embeddings.patch_embedding.weight.dtype

    def hidden_states(self, pixels_N3SS: Tensor, num_layers: int) -> list[Tensor]:
        """Run num_layers layers and return their num_layers + 1 hidden states x_NPD, a class token first.

        Raises: InputError when the pixels are not [N, channels, image_size, image_size].
        """
        expected = (self.num_channels, self.image_size, self.image_size)
        if pixels_N3SS.dim() != 4 or tuple(pixels_N3SS.shape[1:]) != expected:
            raise InputError(
                f"pixels must be [N, {', '.join(map(str, expected))}], got {list(pixels_N3SS.shape)}; use the model's own processor"
            )
        x_NPD = self.vision_model.embeddings(pixels_N3SS)
        states = [x_NPD if self.vision_model.pre_layrnorm is None else self.vision_model.pre_layrnorm(x_NPD)]
        for depth in range(num_layers):
            states.append(self.vision_model.encoder.layers[depth](states[-1]))
        return states

    def features(self, pixels_N3SS: Tensor, *, depths: Sequence[int], keep_cls: bool) -> Tensor:
        """Return the chosen hidden states side by side [N, P, D * len(depths)], without the class token unless keep_cls."""
        states = self.hidden_states(pixels_N3SS, max(depths))
        x_NPD = states[depths[0]] if len(depths) == 1 else torch.cat([states[depth] for depth in depths], -1)
        return x_NPD[:, 1:] if self.has_cls and not keep_cls else x_NPD
