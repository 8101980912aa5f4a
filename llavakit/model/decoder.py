"""The Llama decoder on packed tokens.

Owns: DecoderLayer, the only unit that a fused version may replace, and the only loop over layers of the project.
Refuses: batch shapes, caches, padding (attention contexts know those) and I/O. Parameter names are HF's.
Legend: T tokens  N heads  K key-value heads  H head width  D model width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.config import ModelConfig
from llavakit.errors import ConfigError
from llavakit.model.config import LlamaConfig
from llavakit.model.linear import Embedding, Linear, RMSNorm
from llavakit.ops.attention import Attention
from llavakit.ops.gate import silu_gate
from llavakit.ops.rope import Rope, RopeSpec, rope_tables, rotate

__all__ = ["DecoderLayer", "LlamaDecoder", "RowParallelLinear", "SwiGlu", "TokenEmbedding", "rope_spec"]


class TokenEmbedding(Embedding):
    """Token embeddings whose padding row follows the config: no gradient reaches it, and it is zero until something is loaded.

    A row that resizing added becomes zero when the config names it; a row that a checkpoint brought stays as it is.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.fresh_rows: set[int] = set()
        """Rows that resizing added and nothing was loaded into."""
        self._configs: tuple[ModelConfig, ...] = (config,)

    def follow(self, config: ModelConfig) -> None:
        """Let another config's pad_token_id come before those known so far (LLaVA's before its language model's)."""
        self._configs = (config, *self._configs)

    def has_pad_row(self) -> bool:
        """Whether the config names a padding row that exists."""
        return (pad := self._named_pad()) is not None and pad < self.num_embeddings

    @property
    def pad_id(self) -> int | None:
        """The padding row. Raises: ConfigError when the config names a row that does not exist."""
        pad, rows = self._named_pad(), self.num_embeddings
        if pad is not None and pad >= rows:
            raise ConfigError(f"pad_token_id {pad} must be below the embedding's {rows} rows; resize_token_embeddings adds rows")
        return pad

    def _named_pad(self) -> int | None:
        pads = (config.pad_token_id for config in self._configs)
        return next((pad for pad in pads if pad is not None), None)

    def settle(self) -> None:
        """Make a padding row zero that resizing added before the config named it."""
        if self.fresh_rows and self.pad_id in self.fresh_rows:
            self.zero_pad_row()
            self.fresh_rows.discard(self.pad_id)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.fresh_rows = set()
        super()._load_from_state_dict(*args, **kwargs)

    def zero_pad_row(self) -> None:
        """Set the padding row, where there is one, to zero."""
        if self.pad_id is not None:
            with torch.no_grad():
                self.weight[self.pad_id].zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows."""
        self.settle()
        return F.embedding(input, self.weight, self.pad_id)


class RowParallelLinear(Linear):
    """A product that the original training may have summed from slices (config.pretraining_tp of them).

    With t slices the inputs are cut in t, each partial product is rounded to the activation's dtype, and they are added in order:
    the all-reduce of tensor-parallel training. With one slice it is an ordinary product. Source: facts of transformers 4.32.
    """

    def __init__(self, in_features: int, out_features: int, config: LlamaConfig, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.config = config

    @property
    def num_slices(self) -> int:
        """From how many slices of its inputs the product is summed."""
        return self.config.pretraining_tp

    def forward(self, input: Tensor) -> Tensor:
        """Multiply. Raises: ConfigError when the inputs cannot be cut evenly."""
        num_slices = self.num_slices
        if num_slices == 1:
            return super().forward(input)
        if self.in_features % num_slices:
            raise ConfigError(f"pretraining_tp {num_slices} must divide the width {self.in_features} of every row-parallel product")
        weight = self.weight.to(input.dtype)
        parts = zip(input.chunk(num_slices, -1), weight.chunk(num_slices, 1), strict=True)
        total = F.linear(*next(parts))
        for x, slice_ in parts:
            total = total + F.linear(x, slice_)
        return total if self.bias is None else total + self.bias.to(input.dtype)


def rope_spec(config: LlamaConfig) -> RopeSpec:
    """Return the rotary frequencies that a config describes."""
    scaling = config.rope_scaling
    if scaling is None:
        return RopeSpec(head_dim=config.head_width, theta=config.rope_theta)
    return RopeSpec(
        head_dim=config.head_width,
        theta=config.rope_theta,
        kind=scaling["rope_type"] if "rope_type" in scaling else scaling["type"],
        factor=scaling["factor"],
        original_len=scaling.get("original_max_position_embeddings", config.max_position_embeddings),
        low_freq_factor=scaling.get("low_freq_factor", 1.0),
        high_freq_factor=scaling.get("high_freq_factor", 4.0),
    )


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, with biases where the model has them."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_width
        q_dim, kv_dim = config.num_attention_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = Linear(config.hidden_size, q_dim, bias=config.has_qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_dim, bias=config.has_qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_dim, bias=config.has_qkv_bias)
        self.o_proj = RowParallelLinear(q_dim, config.hidden_size, config, bias=config.attention_bias)

    def forward(self, x_TD: Tensor, rope: Rope, attn: Attention) -> Tensor:
        """Project, rotate, attend through the context, project back."""
        heads = (-1, self.head_dim)
        q_TNH = rotate(self.q_proj(x_TD).unflatten(-1, heads), rope)
        k_TKH = rotate(self.k_proj(x_TD).unflatten(-1, heads), rope)
        v_TKH = self.v_proj(x_TD).unflatten(-1, heads)
        return self.o_proj(attn.attend(self.layer, q_TNH, k_TKH, v_TKH).flatten(-2))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    """The gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate: Callable[[Tensor, Tensor], Tensor] = silu_gate
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, config, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply the block token by token."""
        return self.down_proj(self.gate(self.gate_proj(x_TD), self.up_proj(x_TD)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = SwiGlu(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TD: Tensor, rope: Rope, attn: Attention) -> Tensor:
        """Return the stream after this layer, same shape and dtype."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, attn)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))  # type: ignore[no-any-return]


class LlamaDecoder(nn.Module):
    """Token embedding, the layers, the final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.rope_spec = rope_spec(config)
        self.embed_tokens = TokenEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward_packed(self, x_TD: Tensor, positions_T: Tensor, attn: Attention, taps: list[Tensor] | None = None) -> Tensor:
        """Run all layers over T packed embeddings and return the normed h_TD.

        taps, if given, receives the L+1 hidden states: the embeddings, each layer's output, and last the normed output
        in place of the last layer's.
        """
        rope = rope_tables(positions_T, self.rope_spec, x_TD.dtype)
        for layer in self.layers:
            if taps is not None:
                taps.append(x_TD)
            x_TD = layer(x_TD, rope, attn)
        h_TD: Tensor = self.norm(x_TD)
        if taps is not None:
            taps.append(h_TD)
        return h_TD
