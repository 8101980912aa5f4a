"""The Llama decoder on packed tokens.

Owns: DecoderLayer, the only unit that a fused version may replace, and the only loop over layers of the project.
Refuses: batch shapes, caches, padding (attention contexts know those) and I/O. Parameter names are HF's.
Legend: T tokens  N heads  K key-value heads  H head width  D model width
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.model.config import LlamaConfig
from llavakit.model.linear import Embedding, Linear, RMSNorm
from llavakit.ops.attention import Attention
from llavakit.ops.rope import Rope, rope_tables, rotate

__all__ = ["DecoderLayer", "LlamaDecoder"]


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_width
        q_dim, kv_dim = config.num_attention_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = Linear(config.hidden_size, q_dim, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = Linear(q_dim, config.hidden_size, bias=False)

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
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply the block token by token."""
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))  # type: ignore[no-any-return]


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
        self.head_dim, self.rope_theta = config.head_width, config.rope_theta
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward_packed(self, x_TD: Tensor, positions_T: Tensor, attn: Attention, taps: list[Tensor] | None = None) -> Tensor:
        """Run all layers over T packed embeddings and return the normed h_TD.

        taps, if given, receives the L+1 hidden states: the embeddings, each layer's output, and last the normed output
        in place of the last layer's.
        """
        rope = rope_tables(positions_T, self.head_dim, self.rope_theta, x_TD.dtype)
        for layer in self.layers:
            if taps is not None:
                taps.append(x_TD)
            x_TD = layer(x_TD, rope, attn)
        h_TD: Tensor = self.norm(x_TD)
        if taps is not None:
            taps.append(h_TD)
        return h_TD
